"""Video files and cameras as RGB images, and pictures as a video file, through PyAV."""

import fractions
import re
import sys

from commandline import UserError, missing_package

import numpy as np

VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
CAMERA = re.compile(r"camera:(\d+)")
STREAM = re.compile(r"(rtsp|rtmp|http|https|udp|tcp)://")
# H.264 takes even sides; at this quality (x264's constant rate factor) labels stay sharp.
QUALITY = "20"


def is_video(name):
    """Whether an input is a video file by its name, a camera (`camera:0`) or a stream (`rtsp://...`)."""
    name = str(name)
    return bool(CAMERA.fullmatch(name) or STREAM.match(name) or name.lower().endswith(VIDEOS))


def import_av(option):
    """PyAV's module; raises UserError, naming the option, where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"{option}: videos need PyAV; {missing_package('av')}") from error
    return av


class VideoReader:
    """The frames of a video, a camera or a stream, RGB [H, W, 3] uint8, turned upright. Iterate once; a context manager."""

    def __init__(self, source, option="--input"):
        """Raises UserError, naming the source, where it cannot be opened."""
        av = import_av(f"{option} {source}")
        self._source, self._option, self._errors = str(source), option, av.FFmpegError
        camera = CAMERA.fullmatch(self._source)
        self.is_live = bool(camera or STREAM.match(self._source))
        try:
            self._container = av.open(*_camera(camera[1])) if camera else av.open(self._source)
            self._stream = self._container.streams.video[0]
        except (self._errors, OSError, IndexError) as error:
            reason = getattr(error, "strerror", None) or "it has no pictures"
            raise UserError(f"{option} {source}: it cannot be opened as a video ({reason}); name another") from error
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or fractions.Fraction(25)
        self.frames = None if self.is_live else self._stream.frames or None  # None: not known before the end

    def __iter__(self):
        read = 0
        try:
            for frame in self._container.decode(self._stream):
                read += 1
                yield _upright(frame.to_ndarray(format="rgb24"), frame.rotation)
        except self._errors as error:
            if not read:
                raise UserError(f"{self._option} {self._source}: no frame can be read ({error.strerror})") from error
            self.broken = f"it ends after frame {read}: {error.strerror}"

    broken = None  # why the last frames could not be read

    def close(self):
        self._container.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _camera(number):
    """av.open's (file, mode, format) of a camera, by the system's own interface."""
    if sys.platform == "darwin":
        return number, "r", "avfoundation"
    if sys.platform == "win32":
        return f"video={number}", "r", "dshow"
    return f"/dev/video{number}", "r", "v4l2"


def _upright(image, rotation):
    """The image turned counterclockwise by so many degrees, as a phone's videos say of themselves."""
    return np.ascontiguousarray(np.rot90(image, round(rotation / 90) % 4)) if rotation else image


class VideoWriter:
    """Writes pictures of one size as an H.264 video. A context manager; `path` is one that the caller renames."""

    def __init__(self, path, rate):
        self._av = import_av("--output")
        self._container = self._av.open(str(path), "w")
        self._stream, self._rate = None, rate

    def add(self, image):
        """image: RGB [H, W, 3] uint8; an odd row or column at its end is left out."""
        image = np.asarray(image)
        height, width = (side - side % 2 for side in image.shape[:2])
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": QUALITY})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self):
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
