# GPU 1: INT8 on weights that were trained; then the tests.
. "$(dirname "$0")/env.sh"
export CUDA_VISIBLE_DEVICES=1; cd $WORK/tree
D=$WORK/shapes R50=$WORK/resnet50 T="taskset -c 16-31"
H="--input $D/held_out/images --annotations $D/held_out/instances_shapes.json"
python $WORK/shared/models/materialize.py ssd_resnet50_v1_fpn_640x640_coco17_tpu-8 --output $R50 > /dev/null
$T python benchmarks/train_resnet50.py export --folder $D --saved_model $R50 > $O/export.log 2>&1 &
torch taskset -c 8-31 python3 benchmarks/train_resnet50.py draw --folder $D --processes 24 > $O/draw.log 2>&1
wait; say drawn
torch $T python3 benchmarks/train_resnet50.py train --folder $D --steps 2800 > $O/train.log 2>&1; say trained
$T python benchmarks/train_resnet50.py write --folder $D --saved_model $R50 > $O/write.log 2>&1
$T python create_onnx.py --saved_model $D/ssd_resnet50_v1_fpn_shapes --onnx $D/model.onnx --batch_size dynamic --no_check >> $O/write.log 2>&1
mkdir -p $D/engines
(time $T python build_engine.py --onnx $D/model.onnx --typed_onnx $D/int8.onnx --precision int8 --calib_input $D/calibration/images --calib_cache $D/engines/model.calib) > $O/calibration.log 2>&1; say calibrated
timeout 900 $T python benchmarks/bench_gpu.py --onnx $D/model.onnx --output $D/engines $H --batch 1 8 32 --precision fp32 int8 fp16 > $O/bench.log 2>&1; say "INT8"
timeout 90 python $HERE/side_by_side.py $D/held_out/images $D/engines/model.int8.trt 1,8,32 >> $O/side_by_side 2>&1
CORES="$T" bash $HERE/tests.sh jpeg base limits stages int8
touch $O/training.done
