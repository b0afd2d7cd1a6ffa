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
timeout 200 $T python benchmarks/bench_rounds.py part --onnx $M/fpn.onnx --input $V --output $E/parts --profile 6 > $O/part.log 2>&1
grep '^| \|against' $O/part.log | tail -n 8 >> $O/parts
tests() { n=$1; shift; timeout 300 $T python -m pytest -q --no-header -p no:cacheprovider -m gpu tests/test_gpu.py -k "$*" > $O/test.$n.log 2>&1; say "tests $n: $(tail -n 1 $O/test.$n.log)"; }
tests jpeg "libjpeg or last_bit"
tests base "(detections_are_onnx and not int8) or every_batch or pipeline_gives or decoding_on_the_gpu or processes_share or nothing_stays or any_thread or not_there or beside or infer_writes or second_build"
tests limits "limits or either_suppression or plugin_takes"
tests stages "two_stages"
tests int8 "int8_detections or int8_uses or no_engines"
touch $O/training.done
