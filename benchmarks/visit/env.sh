# What every script of a visit begins with. WORK is the folder that the code lies in, as `tree`.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) WORK=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
if [ -z "$BEFORE" ]; then export BEFORE=1 PATH_BEFORE=$PATH LIBRARIES_BEFORE=$LD_LIBRARY_PATH; fi
. "$WORK/rt/activate" || exit 1
export CUDA_MODULE_LOADING=LAZY CUDA_CACHE_MAXSIZE=4294967296 TF_CPP_MIN_LOG_LEVEL=3
O=$WORK/out M=$WORK/models E=$WORK/engines
V=$WORK/shared/coco/val2017 A=$WORK/shared/coco/instances_val2017_subset.json
CORES="${CORES:-taskset -c 0-15}"
say() { echo "$(date +%H:%M:%S) $*" >> $O/progress; }
# The host's own Python, which has PyTorch.
torch() { env -u PYTHONHOME -u LD_PRELOAD PATH="$PATH_BEFORE" LD_LIBRARY_PATH="$LIBRARIES_BEFORE" "$@"; }
# rates LABEL TREE ENGINE BATCH IMAGES DECODER [GPUS]: a line of what infer.py --benchmark prints
rates() {
  (cd $2 && timeout 60 $CORES python infer.py --engine $3 --input $V --benchmark --batch_size $4 --benchmark_images $5 \
    --decoder $6 ${7:+--gpus $7}) > $O/last.log 2>&1
  echo "$1 batch $4 $6 $7 | $(grep images/s $O/last.log | tr -s ' ' | tr '\n' ';') $(grep 'per image' $O/last.log)" >> $O/rates
  cat $O/last.log >> $O/rates.log
}
