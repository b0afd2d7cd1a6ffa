# GPU 0: engines of each model, and how fast files come to detections; then, where no other GPU does, the tests.
. "$(dirname "$0")/env.sh"
export CUDA_VISIBLE_DEVICES=0; cd $WORK/tree
GPUS=$(env -u CUDA_VISIBLE_DEVICES nvidia-smi -L | wc -l)
TREES=$(cd $WORK; ls -d tree old variant-* 2> /dev/null)
convert() {
  python $WORK/shared/models/materialize.py $2 --output $M/$2 > $O/convert.$1.log 2>&1
  python create_onnx.py --saved_model $M/$2 --onnx $M/$1.onnx --batch_size dynamic --no_check >> $O/convert.$1.log 2>&1
}
build() { python build_engine.py --onnx $M/fpn.onnx --engine $E/$1.trt --precision fp16 --suppression $1 --batch 1 $2 32 --timing_cache $E/fpn.cache --no_benchmark >> $O/build.log 2>&1; say "built $1"; }
side_by_side() { timeout 90 python $HERE/side_by_side.py $V "$@" >> $O/side_by_side 2>&1; }
# full MODEL "MIN OPT MAX" SECONDS "FORMS" [TREE]: whole engines by the code of a tree, with one timing cache for all trees
full() {
  local tree=${5:-tree}
  mkdir -p $E/$tree; cp $E/$1.fp16.cache $E/$tree/ 2> /dev/null
  (cd $WORK/$tree && timeout $3 $CORES python benchmarks/bench_rounds.py full --onnx $M/$1.onnx --input $V --output $E/$tree --batch $2 --profile 14 --forms $4) > $O/full.$1.$tree.log 2>&1
  cp $E/$tree/$1.fp16.cache $E/
  { echo "== $1, $tree"; grep '^|' $O/full.$1.$tree.log | tail -n 4; } >> $O/full; say "full $1 $tree"
}
convert fpn ssd_mobilenet_v2_fpnlite_320x320_coco17
(convert r50 ssd_resnet50_v1_fpn_640x640_coco17_tpu-8; convert frcnn faster_rcnn_resnet50_v1_640x640_coco17_tpu-8
 convert mask mask_rcnn_inception_resnet_v2_1024x1024_coco17_gpu-8) &
build plugin 32
build rounds 8
if [ $GPUS -gt 1 ]; then
  # Both GPUs: what trains on the other one stands still meanwhile.
  pkill -STOP -f train_resnet5[0].py
  CORES="env -u CUDA_VISIBLE_DEVICES" rates two-tree $WORK/tree $E/rounds.trt 8 40000 gpu 0,1
  CORES="env -u CUDA_VISIBLE_DEVICES" rates two-tree $WORK/tree $E/plugin.trt 32 60000 gpu 0,1
  pkill -CONT -f train_resnet5[0].py
  say "two GPUs"
fi
wait  # conversions are for processors too
for d in cpu gpu; do rates tree $WORK/tree $E/rounds.trt 1 6000 $d; done
rates tree $WORK/tree $E/rounds.trt 8 20000 gpu
rates tree $WORK/tree $E/plugin.trt 32 30000 gpu
rates tree $WORK/tree $E/rounds.trt 32 30000 gpu
rates tree $WORK/tree $E/plugin.trt 32 6000 cpu
python $HERE/links.py $V $A $WORK/five $WORK/five.json 27
for turn in 1 2; do $CORES python eval_coco.py --engine $E/plugin.trt --input $WORK/five --annotations $WORK/five.json --batch_size 32 > $O/eval.$turn.log 2>&1; done
for d in gpu cpu; do
  $CORES python infer.py --engine $E/rounds.trt --input $WORK/five --benchmark --benchmark_images 5640 --batch_size 8 --decoder $d --output $WORK/drawn > $O/pictures.$d.log 2>&1
  rm -rf $WORK/drawn
done
side_by_side $E/plugin.trt 1,8,32
side_by_side $E/rounds.trt 1,8,32
say "files, pictures"
full mask "1 1 2" 420 plugin old
full mask "1 1 2" 300 rounds
full r50 "1 8 8" 300 plugin old
full r50 "1 8 8" 200 "rounds plugin"
rates r50 $WORK/tree $E/tree/r50.full.fp16.rounds.trt 8 4000 gpu
full frcnn "1 8 8" 300 plugin old
full frcnn "1 8 8" 200 rounds
for t in $TREES; do [[ $t == variant-* ]] && full frcnn "1 8 8" 200 rounds $t; done
rates frcnn $WORK/tree $E/tree/frcnn.full.fp16.rounds.trt 8 4000 gpu
side_by_side $E/tree/frcnn.full.fp16.rounds.trt 1,8
[ $GPUS -gt 1 ] || bash $HERE/tests.sh stages
touch $O/engines.done
[ $GPUS -gt 1 ] || bash $HERE/tests.sh limits base int8 jpeg
