# GPU 0: engines of each model, and how fast files come to detections.
. "$(dirname "$0")/env.sh"
export CUDA_VISIBLE_DEVICES=0; cd $WORK/tree
convert() {
  python $WORK/shared/models/materialize.py $2 --output $M/$2 > $O/convert.$1.log 2>&1
  python create_onnx.py --saved_model $M/$2 --onnx $M/$1.onnx --batch_size dynamic --no_check >> $O/convert.$1.log 2>&1
}
build() { python build_engine.py --onnx $M/fpn.onnx --engine $E/$1.trt --precision fp16 --suppression $1 --batch 1 $2 32 --timing_cache $E/fpn.cache --no_benchmark >> $O/build.log 2>&1; say "built $1"; }
side_by_side() { timeout 90 python $HERE/side_by_side.py $V "$@" >> $O/side_by_side 2>&1; }
full() { timeout $3 taskset -c 0-15 python benchmarks/bench_rounds.py full --onnx $M/$1.onnx --input $V --output $E --batch $2 --profile 12 --forms $4 > $O/full.$1.log 2>&1; { echo "== $1"; grep '^|' $O/full.$1.log | tail -n 4; } >> $O/full; say "full $1"; }
convert fpn ssd_mobilenet_v2_fpnlite_320x320_coco17
(convert frcnn faster_rcnn_resnet50_v1_640x640_coco17_tpu-8; convert r50 ssd_resnet50_v1_fpn_640x640_coco17_tpu-8
 convert mask mask_rcnn_inception_resnet_v2_1024x1024_coco17_gpu-8; say converted) &
build plugin 32
build rounds 8
# Both GPUs: what trains on the other one stands still meanwhile.
pkill -STOP -f train_resnet5[0].py
for t in tree old; do
  CORES="env -u CUDA_VISIBLE_DEVICES" rates two-$t $WORK/$t $E/rounds.trt 8 40000 gpu 0,1
  CORES="env -u CUDA_VISIBLE_DEVICES" rates two-$t $WORK/$t $E/plugin.trt 32 60000 gpu 0,1
done
pkill -CONT -f train_resnet5[0].py
say "two GPUs"
for t in tree old; do
  for d in cpu gpu; do rates $t $WORK/$t $E/rounds.trt 1 6000 $d; done
  rates $t $WORK/$t $E/rounds.trt 8 20000 gpu
  rates $t $WORK/$t $E/plugin.trt 32 20000 gpu
done
rates tree $WORK/tree $E/plugin.trt 32 6000 cpu
python $HERE/links.py $V $A $WORK/five $WORK/five.json 27
for t in tree old; do
  (cd $WORK/$t && taskset -c 0-15 python eval_coco.py --engine $E/plugin.trt --input $WORK/five --annotations $WORK/five.json --batch_size 32) > $O/eval.$t.log 2>&1
  for d in gpu cpu; do
    (cd $WORK/$t && taskset -c 0-15 python infer.py --engine $E/rounds.trt --input $WORK/five --benchmark --benchmark_images 5640 --batch_size 8 --decoder $d --output $WORK/drawn) > $O/pictures.$t.$d.log 2>&1
    rm -rf $WORK/drawn
  done
done
side_by_side $E/plugin.trt 1,8,32
side_by_side $E/rounds.trt 1,8,32
say "files, pictures"
full r50 "1 8 8" 240 "plugin rounds"
full frcnn "1 8 8" 280 "plugin rounds"
for m in r50 frcnn; do
  for t in tree old; do rates $m-$t $WORK/$t $E/$m.full.fp16.rounds.trt 8 4000 gpu; done
  side_by_side $E/$m.full.fp16.rounds.trt 1,8
done
full mask "1 1 8" 420 "rounds plugin"
touch $O/engines.done
