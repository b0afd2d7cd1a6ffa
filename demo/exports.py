"""How the tiny models are written: as TFOD writes its exports."""

from pathlib import Path


def write_export(folder, module, config):
    """Writes a tf.Module, whose __call__ is the signature, and the text of its pipeline.config as an export in `folder`."""
    import tensorflow as tf

    folder = Path(folder)
    tf.saved_model.save(module, str(folder / "saved_model"), signatures={"serving_default": module.__call__})
    (folder / "pipeline.config").write_text(config)
