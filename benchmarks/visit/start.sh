# start.sh WORK SECONDS [train]: from the checkout's root; see README.md
WORK=$1
for needed in rt/activate old/infer.py shared/coco/val2017 shared/coco/instances_val2017_subset.json shared/models/materialize.py; do
  [ -e $WORK/$needed ] || { echo "start.sh: $WORK/$needed is missing; see benchmarks/visit/README.md"; exit 2; }
done
rm -rf $WORK/out $WORK/tree; mkdir -p $WORK/tree $WORK/out $WORK/models $WORK/engines
tar --exclude=./.[a-z]* --exclude=./build -cf - . | tar -C $WORK/tree -xf -
. $WORK/tree/benchmarks/visit/env.sh
nvidia-smi --query-gpu=name,driver_version --format=csv > $O/gpus
[ $(nvidia-smi -L | wc -l) -gt 1 ] || set -- $1 $2  # one GPU has no time to train
TRAIN=$3 setsid nohup bash $HERE/engines.sh > $O/engines.log 2>&1 &
if [ -n "$3" ]; then setsid nohup bash $HERE/training.sh > $O/training.log 2>&1 & else touch $O/training.done; fi
bash $HERE/wait.sh $2
