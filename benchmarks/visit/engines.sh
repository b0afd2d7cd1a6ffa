# GPU 0: engines of each model, built side by side; when the SSDs' are there, they and files are timed. Two-stage models are built, and
# tests run, on the other GPU, where there is one that does not train. What would disturb stands still meanwhile.
. "$(dirname "$0")/env.sh"
GPUS=$(nvidia-smi -L | wc -l); BESIDE=$([ $GPUS -gt 1 ] && [ -z "$TRAIN" ] && echo 1 || echo 0)
export CUDA_VISIBLE_DEVICES=0; mkdir -p $O/caches
VARIANTS=$(cd $WORK; ls -d variant-* 2> /dev/null)
# convert MODEL PACKED CORES
convert() {
  python $WORK/shared/models/materialize.py $2 --output $M/$1 > $O/convert.$1.log 2>&1
  (cd $WORK/tree; taskset -c $3 python create_onnx.py --saved_model $M/$1 --onnx $M/$1.onnx --batch_size dynamic --no_check) >> $O/convert.$1.log 2>&1
}
# build TREE MODEL FORM "MIN OPT MAX" CORES: an engine, with the timing cache of an earlier visit where there is one
build() {
  local name=$2.$1.$3
  cp $WORK/caches/$2.cache $E/$name.cache 2> /dev/null
  (cd $WORK/$1; taskset -c $5 python build_engine.py --onnx $M/$2.onnx --engine $E/$name.trt --precision fp16 --suppression $3 --batch $4 \
    --timing_cache $E/$name.cache --no_benchmark) > $O/build.$name.log 2>&1
  cp $E/$name.cache $O/caches/$2.cache; say "built $name: $(tail -n 1 $O/build.$name.log | cut -c1-60)"
}
# clock TREE ENGINE BATCH,BATCH,...: by the code of that tree
for tree in old $VARIANTS; do mkdir -p $WORK/$tree/benchmarks/visit; cp $HERE/side_by_side.py $WORK/$tree/benchmarks/visit/; done
clock() { timeout 90 $CORES python $WORK/$1/benchmarks/visit/side_by_side.py $V $E/$2.trt $3 >> $O/side_by_side 2>&1; }
kernels() { timeout 60 $CORES python benchmarks/kernels.py --engine $E/$1.trt --input $V --batch $2 > $O/kernels.$1.log 2>&1; }

(convert fpn ssd_mobilenet_v2_fpnlite_320x320_coco17 0-3
 build tree fpn rounds "1 8 32" 0 & build tree fpn plugin "1 32 32" 1 & build old fpn plugin "1 32 32" 2
 for v in $VARIANTS; do build $v fpn rounds "1 8 32" 3 & done; wait) & small=$!
(convert r50 ssd_resnet50_v1_fpn_640x640_coco17_tpu-8 4-7
 build tree r50 rounds "1 8 8" 4,5 & build old r50 plugin "1 8 8" 6,7
 for v in $VARIANTS; do build $v r50 rounds "1 8 8" 4-7 & done; wait) & larger=$!
beside() { CUDA_VISIBLE_DEVICES=$BESIDE "$@"; }
[ $BESIDE = 1 ] && MASK=16-19 FRCNN=20-23 TESTS=24-31 || MASK=8-11 FRCNN=12,13 TESTS=14,15
(beside convert mask mask_rcnn_inception_resnet_v2_1024x1024_coco17_gpu-8 $MASK
 beside build tree mask rounds "1 1 2" $MASK & beside build old mask plugin "1 1 2" $MASK; wait) & mask=$!
(beside convert frcnn faster_rcnn_resnet50_v1_640x640_coco17_tpu-8 $FRCNN
 beside build tree frcnn rounds "1 8 8" $FRCNN & beside build old frcnn plugin "1 8 8" $FRCNN; wait) & two_stage=$!
groups="jpeg limits base int8 stages"  # side by side, or one after the other beside everything else
if [ $BESIDE = 1 ]; then
  for group in $groups; do CORES="taskset -c $TESTS" beside bash $HERE/tests.sh $group & tests="$tests $!"; done
elif [ -z "$TRAIN" ]; then
  CORES="taskset -c $TESTS" beside bash $HERE/tests.sh $groups & tests=$!
fi

wait $small $larger; say "quiet"
# What converts and builds larger models, trains and tests, by command lines.
OTHERS="/mask|/frcnn|/shapes|pytest"
stop() { pkill -STOP -f "$OTHERS"; }
[ $BESIDE = 1 ] || stop
cd $WORK/tree
clock old fpn.old.plugin 1,8,32
clock tree fpn.tree.plugin 1,8,32
clock tree fpn.tree.rounds 1,8,32
clock old r50.old.plugin 1,8
clock tree r50.tree.rounds 1,8
for v in $VARIANTS; do clock $v fpn.$v.rounds 1,8,32; clock $v r50.$v.rounds 1,8; done
say "times"
kernels fpn.tree.rounds "1 8 32"
kernels r50.tree.rounds "1 8"
for d in cpu gpu; do rates tree $WORK/tree $E/fpn.tree.rounds.trt 1 6000 $d; done
rates tree $WORK/tree $E/fpn.tree.rounds.trt 8 20000 gpu
for form in rounds plugin; do rates $form $WORK/tree $E/fpn.tree.$form.trt 32 30000 gpu; done
rates tree $WORK/tree $E/fpn.tree.plugin.trt 32 6000 cpu
rates r50 $WORK/tree $E/r50.tree.rounds.trt 8 4000 gpu
python $HERE/links.py $V $A $WORK/five $WORK/five.json 27
for form in rounds plugin; do timeout 60 $CORES python eval_coco.py --engine $E/fpn.tree.$form.trt --input $WORK/five --annotations $WORK/five.json --batch_size 32 > $O/eval.$form.log 2>&1; done
for d in gpu cpu; do
  timeout 60 $CORES python infer.py --engine $E/fpn.tree.rounds.trt --input $WORK/five --benchmark --benchmark_images 5640 --batch_size 8 --decoder $d --output $WORK/drawn > $O/pictures.$d.log 2>&1
  rm -rf $WORK/drawn
done
say "files, pictures"
if [ $GPUS -gt 1 ]; then
  stop
  CORES="env -u CUDA_VISIBLE_DEVICES" rates two-tree $WORK/tree $E/fpn.tree.rounds.trt 8 40000 gpu 0,1
  for form in rounds plugin; do CORES="env -u CUDA_VISIBLE_DEVICES" rates two-tree $WORK/tree $E/fpn.tree.$form.trt 32 60000 gpu 0,1; done
fi
pkill -CONT -f "$OTHERS"
wait $mask $two_stage
[ $BESIDE = 1 ] || stop
clock tree frcnn.tree.rounds 1,8
clock old frcnn.old.plugin 1,8
clock tree mask.tree.rounds 1,2
clock old mask.old.plugin 1,2
rates frcnn $WORK/tree $E/frcnn.tree.rounds.trt 8 4000 gpu
pkill -CONT -f "$OTHERS"; say "two-stage models"
wait $tests
touch $O/engines.done
