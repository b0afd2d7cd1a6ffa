"""Trains SSD ResNet50 V1 FPN 640, TFOD's own graph, on the demo's shapes: weights that show what INT8 costs.

    python  benchmarks/train_resnet50.py export --folder build/shapes --saved_model ssd_resnet50_v1_fpn_640x640_coco17_tpu-8
    python3 benchmarks/train_resnet50.py draw --folder build/shapes
    python3 benchmarks/train_resnet50.py train --folder build/shapes --minutes 8
    python  benchmarks/train_resnet50.py write --folder build/shapes --saved_model ssd_resnet50_v1_fpn_640x640_coco17_tpu-8

export and write need TensorFlow, train PyTorch with an NVIDIA GPU, onnx and ONNX Runtime, draw Pillow alone: `python` and
`python3` may be different ones. The folder gets network.onnx and anchors.npy of export; training.npy, objects.npz, held_out/ and
calibration/ of draw; trained.onnx of train; ssd_resnet50_v1_fpn_shapes/, a TFOD export, of write.
"""

import concurrent.futures
import functools
import itertools
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commandline import UserError, command, make_folder, progress, run, whole_file
from commandline.options import count, count_from_0, make_parser, size

import numpy as np

from demo.train_demo_ssd import BOX_SCALES, Scene, draw_scene, write_images
from images.resizing import resize_image

COMMANDS = """
INT8 on the trained model, where TensorRT is:

    D=build/shapes H=$D/held_out
    python create_onnx.py --saved_model $D/ssd_resnet50_v1_fpn_shapes --onnx $D/model.onnx --batch_size dynamic
    python eval_coco.py --engine $D/model.onnx --input $H/images --annotations $H/instances_shapes.json
    python benchmarks/bench_gpu.py --onnx $D/model.onnx --output $D/engines --input $H/images \\
        --annotations $H/instances_shapes.json --calib_input $D/calibration/images --batch 1 8 32
    python build_engine.py --onnx $D/model.onnx --typed_onnx $D/int8.onnx --precision int8 --calib_input $D/calibration/images
    python eval_coco.py --engine $D/int8.onnx --input $H/images --annotations $H/instances_shapes.json
"""
SIDE = 640  # the network's input, pixels
# Small and hidden shapes, faint ones and noise: few are missed, but boxes of all are not exact.
SCENE = Scene(sides=(0.04, 0.4), overlap=0.4, contrast=30, noise=40.0, strokes=40)
PLACES = 20  # made up for shapes in each picture; half of them are taken
BLOCK = 8  # pictures that a process draws at a time
# pipeline.config: argmax_matcher (both thresholds), weighted_sigmoid_focal, batch_norm, class_prediction_bias_init
MATCHED_FROM = 0.5
ALPHA, GAMMA = 0.25, 2.0
DECAY = 0.997
CLASS_BIAS = -4.6
# and the deviation that a box predictor's kernels begin with.
PREDICTOR_DEVIATION = 0.01
WARM_UP = 0.05  # of the training
CLIP_NORM = 10.0  # of the gradient
EVERY = 100  # steps between two lines
SEEDS = {"training": 1, "held_out": 2, "calibration": 3}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.epilog = COMMANDS
    stages = parser.add_subparsers(dest="stage", required=True, metavar="export | draw | train | write")
    stage = functools.partial(_add_stage, stages)
    stage("export", saved_model=True)
    draw = stage("draw")
    draw.add_argument("--pictures", type=count, default=12000, help="to train on, 1.2 MB each; default: 12000")
    draw.add_argument("--held_out", type=count, default=500, help="pictures to evaluate on; default: 500")
    draw.add_argument("--calibration", type=count, default=200, help="pictures to calibrate on; default: 200")
    draw.add_argument("--processes", type=count, help="default: one for each core")
    train = stage("train")
    train.add_argument("--minutes", type=size, default=8, help="of training; default: 8")
    train.add_argument("--steps", type=count, help="so many steps, instead of minutes: can be repeated")
    train.add_argument("--batch_size", type=count, default=32, help="default: 32")
    train.add_argument("--learning_rate", type=size, default=1e-3, help="the highest, of AdamW; default: 0.001")
    train.add_argument("--weight_decay", type=size, default=0.05, help="of kernels; default: 0.05")
    train.add_argument("--seed", type=count_from_0, default=0)
    train.add_argument("--device", default="cuda", help="PyTorch's; cpu: to try it out; default: cuda")
    stage("write", saved_model=True)
    return parser.parse_args(argv)


def _add_stage(stages, name, saved_model=False):
    parser = stages.add_parser(name)
    parser.add_argument("--folder", type=Path, required=True, help="of all that is written, the same for each stage")
    if saved_model:
        parser.add_argument("--saved_model", required=True, help="TFOD's export of SSD ResNet50 V1 FPN 640")
    return parser


def export(args):
    import onnx

    from benchmarks.trainable import export_network

    network, anchors = export_network(args.saved_model)
    shape = [dim.dim_value for dim in network.graph.input[0].type.tensor_type.shape.dim[1:]]
    if shape != [SIDE, SIDE, 3]:
        raise UserError(
            f"--saved_model {args.saved_model}: its input is {shape}; pictures are drawn for {SIDE} x {SIDE}"
        )
    make_folder(args.folder)
    np.save(args.folder / "anchors.npy", anchors)
    with whole_file(args.folder / "network.onnx") as path:
        onnx.save(network, path)
    what = f"{len(network.graph.node)} nodes, {len(anchors)} anchors"
    print(f"Wrote {args.folder / 'network.onnx'}: {what}. Next: {following('draw', args)}")


def write(args):
    import onnx

    from benchmarks.trainable import checkpoint_keys, find_saved_model, write_saved_model

    trained = onnx.load(made(args.folder, "trained.onnx", "train")).graph.initializer
    names = checkpoint_keys(find_saved_model(args.saved_model))
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in trained if tensor.name in names}
    output = args.folder / "ssd_resnet50_v1_fpn_shapes"
    write_saved_model(args.saved_model, weights, output)
    print(
        f"Wrote {output} with {len(weights)} variables. Next: create_onnx.py and eval_coco.py (--help has the commands)"
    )


def draw_picture(number, side=SIDE):
    """A picture to train on: (RGB [side, side, 3] uint8, boxes [N, 4] yxyx of 0..1, classes [N]). The same for a number."""
    rng = np.random.default_rng([SEEDS["training"], number])
    width, height = (int(x) for x in rng.integers(side * 3 // 4, side * 5 // 4, 2))
    pixels, boxes, classes = draw_scene(rng, width, height, PLACES, SCENE)
    return np.rint(resize_image(pixels, side, side)).astype(np.uint8), boxes / [height, width, height, width], classes


def draw_block(path, numbers):
    """Draws the pictures of these numbers into the array in the file `path`; returns their [(boxes, classes)]."""
    pixels, objects = np.load(path, mmap_mode="r+"), []
    for number in numbers:
        pixels[number], boxes, classes = draw_picture(number)
        objects.append((boxes, classes))
    return objects


def draw_set(name, count, folder):
    """Writes FOLDER/NAME/images and instances_shapes.json."""
    write_images(folder / name, count, SEEDS[name], PLACES, SCENE)


def draw(args):
    """Pictures to train on go into one array, those to evaluate and to calibrate on into JPEG files."""
    folder, number, begin = make_folder(args.folder), args.pictures, time.monotonic()
    boxes, classes = np.zeros((number, PLACES, 4), np.float32), np.full((number, PLACES), -1, np.int64)
    blocks = [range(i, min(i + BLOCK, number)) for i in range(0, number, BLOCK)]
    spawn = multiprocessing.get_context("spawn")
    with (
        whole_file(folder / "training.npy") as path,
        concurrent.futures.ProcessPoolExecutor(args.processes, spawn) as processes,
    ):
        np.lib.format.open_memmap(path, "w+", np.uint8, (number, SIDE, SIDE, 3)).flush()
        others = [processes.submit(draw_set, name, getattr(args, name), folder) for name in ("held_out", "calibration")]
        drawn = processes.map(draw_block, itertools.repeat(path), blocks)
        for block, objects in progress(zip(blocks, drawn, strict=True), total=len(blocks), desc="drawing"):
            for i, (found, kinds) in zip(block, objects, strict=True):
                boxes[i, : len(found)], classes[i, : len(found)] = found, kinds
        for other in others:
            other.result()
    np.savez(folder / "objects.npz", boxes=boxes, classes=classes)
    shapes, seconds = (classes >= 0).sum() / number, time.monotonic() - begin
    print(
        f"Drew {number} pictures to train on, {shapes:.1f} shapes in each, {folder}/held_out and calibration: {seconds:.0f} s."
        f" Next: {following('train', args)}"
    )


def match(xp, boxes, real, anchors):
    """Which object each anchor is to find, as TFOD's ArgMaxMatcher has it with force_match_for_each_row: [B, A], -1 for none.

    xp: numpy or torch. boxes: [B, M, 4] yxyx; real: [B, M], which of them there are; anchors: [A, 4].
    """
    boxes = boxes[:, :, None]
    sides = xp.minimum(boxes[..., 2:], anchors[:, 2:]) - xp.maximum(boxes[..., :2], anchors[:, :2])
    inter = sides.clip(min=0).prod(-1)  # [B, M, A]
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (boxes, anchors)]
    iou = xp.where(real[:, :, None], inter / (areas[0] + areas[1] - inter), -1.0)
    numbers = xp.cumsum(xp.ones_like(anchors[:, 0]), 0) - 1  # 0, 1, 2 ... where the anchors are
    forced = (iou.argmax(2)[:, :, None] == numbers) & real[:, :, None]  # each object's best anchor, the first of such
    best = xp.where(xp.amax(iou, 1) >= MATCHED_FROM, iou.argmax(1), -1)
    return xp.where(forced.any(1), (forced * 1).argmax(1), best)


def encode(xp, boxes, anchors):
    """Boxes [N, 4] yxyx as an anchor [N, 4] is to predict them (TFOD: FasterRcnnBoxCoder._encode)."""
    size, box_size = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = ((boxes[:, :2] + box_size / 2) - (anchors[:, :2] + size / 2)) / size
    scales = xp.asarray(BOX_SCALES, dtype=boxes.dtype, device=boxes.device)
    return xp.concatenate([shift, xp.log(box_size / size)], 1) * scales


def losses(torch, found, boxes, classes, anchors):
    """(class loss, box loss) of what the network predicts, as pipeline.config says: both by the number of matched anchors.

    found: {"encodings", "logits"}, background first. boxes: [B, M, 4]; classes: [B, M] from 0, -1 where there is no object.
    """
    F = torch.nn.functional
    rows = match(torch, boxes, classes >= 0, anchors)
    image, anchor = torch.where(rows >= 0)
    row = rows[image, anchor]
    matched = max(len(row), 1)

    def focal(logits, weight):  # (Lin et al., 2017) for a score that should be 0
        return weight * torch.sigmoid(logits) ** GAMMA * F.softplus(logits)

    logits = found["logits"][..., 1:].float()
    right = logits[image, anchor, classes[image, row]]
    class_loss = focal(logits, 1 - ALPHA).sum() + (focal(-right, ALPHA) - focal(right, 1 - ALPHA)).sum()
    codes = found["encodings"].reshape(len(boxes), -1, 4)[image, anchor].float()
    wanted = encode(torch, boxes[image, row], anchors[anchor])
    return class_loss / matched, F.smooth_l1_loss(codes, wanted, reduction="sum") / 4 / matched


def vary(torch, random, pixels, boxes):
    """A batch of uint8 pictures with colours exchanged, inverted and shifted, half of it mirrored: as the demo's training."""
    batch = len(pixels)

    def uniform(low, high, *shape):
        return torch.rand(batch, *shape, generator=random, device=pixels.device) * (high - low) + low

    mirrored, inverted = (uniform(-1, 1, 1, 1, 1) > 0 for _ in range(2))
    colours = uniform(0, 1, 3).argsort(1)[:, None, None].expand(pixels.shape)
    images = torch.where(mirrored, pixels.flip(2), pixels).gather(3, colours).float()
    images = torch.where(inverted, 255 - images, images) * uniform(0.7, 1.3, 1, 1, 3) + uniform(-30, 30, 1, 1, 1)
    y0, x0, y1, x1 = boxes.unbind(2)
    return images.clip(0, 255), torch.where(mirrored[:, 0], torch.stack([y0, 1 - x1, y1, 1 - x0], 2), boxes)


def initialise(torch, network, random):
    """Weights to begin from: He et al.'s (2015) before batch norms; TFOD's own for predictors, which score nothing at first."""
    predictors = {output: network.before(output) for output in network.outputs}
    biases = {network.source(conv.input[2]) for conv in predictors["logits"]}
    last = {network.source(conv.input[1]) for convs in predictors.values() for conv in convs}
    with torch.no_grad():
        for name in network.kernels():
            kernel = network.weights[name]  # [height, width, in, out]
            deviation = (2 / kernel[..., 0].numel()) ** 0.5
            kernel.normal_(0, PREDICTOR_DEVIATION if name in last else deviation, generator=random)
        for gamma, beta, mean, variance in network.batch_norms():
            gamma.fill_(1), beta.zero_(), mean.zero_(), variance.fill_(1)
        for name in network.biases():
            network.weights[name].fill_(CLASS_BIAS if name in biases else 0)


def check_network(torch, network, path, pictures):
    """Raises UserError unless PyTorch computes what ONNX Runtime does, on these pictures [B, H, W, 3]."""
    import onnxruntime

    images = pictures.astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.run(network.outputs, {network.input: images})
    with torch.no_grad():
        found = network(torch.tensor(images))
    for name, values in zip(network.outputs, wanted, strict=True):
        difference = np.abs(found[name].numpy() - values).max()
        print(f"{name}: PyTorch and ONNX Runtime differ by {difference:.1e} at most")
        if not difference < 1e-3 * max(1, np.abs(values).max()):
            raise UserError(f"{path}: PyTorch computes other {name}; nothing was trained")


def following(stage, args):
    """The command of the next stage."""
    return command(Path(__file__).name, stage, "--folder", args.folder)


def made(folder, name, stage):
    """The path of a file that an earlier stage writes. Raises UserError where it is missing."""
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing: the stage {stage} writes it, with the same --folder")
    return folder / name


def train(args):
    try:
        import onnx
        import torch

        from benchmarks.torch_network import TorchNetwork
    except ModuleNotFoundError as error:
        raise UserError(f"the stage train needs {error.name}: run it with a Python that has it") from error
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: PyTorch finds no GPU; cpu is good for trying it out")
    folder = args.folder
    path = made(folder, "network.onnx", "export")
    model, anchors = onnx.load(path), np.load(made(folder, "anchors.npy", "export"))
    objects = np.load(made(folder, "objects.npz", "draw"))
    pixels = np.load(made(folder, "training.npy", "draw"), mmap_mode="r")
    check_network(torch, TorchNetwork(model, "cpu"), path, pixels[:2])
    torch.backends.cudnn.benchmark = True
    random = torch.Generator(args.device).manual_seed(args.seed)
    network = TorchNetwork(model, args.device)
    initialise(torch, network, random)
    begin = time.monotonic()
    data = load_data(torch, pixels, objects, args.device)
    print(f"{len(pixels)} pictures are on the device after {time.monotonic() - begin:.0f} s", flush=True)
    fit(torch, network, data, torch.tensor(anchors, device=args.device), random, args)
    with whole_file(folder / "trained.onnx") as path:
        network.write(path, model)
    print(f"Wrote {folder / 'trained.onnx'}. Next: {following('write', args)} --saved_model MODEL, as for export")


def load_data(torch, pixels, objects, device):
    """(pictures [N, H, W, 3] uint8, boxes [N, M, 4], classes [N, M]) on the device."""
    pictures = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for i in range(0, len(pixels), 256):
        pictures[i : i + 256] = torch.from_numpy(np.array(pixels[i : i + 256]))
    return pictures, *(torch.tensor(objects[name], device=device) for name in ("boxes", "classes"))


def fit(torch, network, data, anchors, random, args):
    """Trains the network: AdamW, the learning rate warmed up, then half a cosine down to 0 over the minutes or the steps."""
    cuda = torch.device(args.device).type == "cuda"
    kernels = [network.weights[name] for name in network.kernels()]
    others = [weight for name, weight in network.weights.items() if name not in network.kernels()]
    groups = [{"params": kernels, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=cuda)
    begin = mark = time.monotonic()
    sums = torch.zeros(2, device=args.device)
    for step in itertools.count():
        done = step / args.steps if args.steps else (time.monotonic() - begin) / 60 / args.minutes
        if done >= 1:
            break
        rate = args.learning_rate * min(done / WARM_UP, 1.0) * (1 + np.cos(np.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(data[0]), (args.batch_size,), generator=random, device=args.device)
        pixels, boxes, classes = (values[rows] for values in data)
        images, boxes = vary(torch, random, pixels, boxes)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=cuda):
            # In the beginning a plain average: a short training has sensible ones too.
            found = network(images, momentum=max(1 - DECAY, 1 / (step + 1)))
        parts = torch.stack(losses(torch, found, boxes, classes, anchors))
        optimizer.zero_grad(set_to_none=True)
        parts.sum().backward()
        torch.nn.utils.clip_grad_norm_(kernels + others, CLIP_NORM, foreach=True)
        optimizer.step()
        sums += parts.detach()
        if (step + 1) % EVERY == 0:
            mark = report(step + 1, (sums / EVERY).tolist(), EVERY * args.batch_size, rate, begin, mark)
            sums.zero_()
    print(f"{step} steps of {args.batch_size} in {time.monotonic() - begin:.0f} s")


def report(step, means, images, rate, begin, mark):
    """Prints how training goes; returns the time. Raises UserError where it has failed."""
    now = time.monotonic()
    speed = images / (now - mark)
    print(
        f"step {step}, {now - begin:.0f} s: class loss {means[0]:.4f}, box loss {means[1]:.4f}, rate {rate:.1e},"
        f" {speed:.0f} images/s",
        flush=True,
    )
    if not np.isfinite(means).all():
        raise UserError("the loss is no longer finite: give a lower --learning_rate")
    return now


def main(argv=None):
    args = parse_args(argv)
    return {"export": export, "draw": draw, "train": train, "write": write}[args.stage](args)


if __name__ == "__main__":
    run(main)
