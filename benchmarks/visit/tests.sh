# tests.sh GROUP...: the tests that need a GPU, on the one that is visible
. "$(dirname "$0")/env.sh"
cd $WORK/tree
declare -A groups=(
  [jpeg]="libjpeg or last_bit"
  [base]="(detections_are_onnx and not int8) or every_batch or pipeline_gives or decoding_on_the_gpu or processes_share or nothing_stays or one_batch_size or any_thread or not_there or beside or infer_writes or second_build"
  [limits]="limits or either_suppression or plugin_takes"
  [stages]="two_stages or several_levels"
  [int8]="int8_detections or int8_uses or no_engines"
)
for group; do
  timeout 1500 $CORES python -m pytest -q --no-header -p no:cacheprovider -m gpu tests/test_gpu.py -k "${groups[$group]}" > $O/test.$group.log 2>&1
  say "tests $group: $(tail -n 1 $O/test.$group.log)"
done
