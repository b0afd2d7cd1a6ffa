# start.sh SECONDS: from the checkout's root; see README.md
[ -e /tmp/rt/activate ] || { echo "no runtime in /tmp/rt"; exit 1; }
rm -rf /tmp/out; mkdir -p /tmp/tree /tmp/out /tmp/models /tmp/engines
git ls-files -z 2>/dev/null | xargs -0r cp --parents -t /tmp/tree || true
[ -e /tmp/tree/infer.py ] || tar --exclude=./.gpu --exclude=./.visit --exclude=./.venv --exclude=./build --exclude=./.git -cf - . | tar -C /tmp/tree -xf -
. /tmp/tree/benchmarks/visit/env.sh
nvidia-smi --query-gpu=name,driver_version --format=csv > $O/gpus
setsid nohup bash $HERE/engines.sh > $O/engines.log 2>&1 &
setsid nohup bash $HERE/training.sh > $O/training.log 2>&1 &
bash $HERE/wait.sh $1
