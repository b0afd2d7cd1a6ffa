# wait.sh SECONDS: until both jobs are done, so long at most; prints what there is
. "$(dirname "$0")/env.sh"
end=$((SECONDS + $1))
while [ $SECONDS -lt $end ] && ! { [ -e $O/engines.done ] && [ -e $O/training.done ]; }; do sleep 5; done
tar -C $WORK -czf $OUT/out.tar.gz out
cat $O/progress
for f in rates side_by_side engines.log training.log train.log calibration.log bench.log; do
  echo "== $f"; tail -n 40 $O/$f 2>/dev/null | cut -c1-260
done
