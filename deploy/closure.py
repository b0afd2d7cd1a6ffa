"""What a module needs of this project, to run elsewhere without it."""

import modulefinder
import shutil
from pathlib import Path

from commandline import ROOT
from commandline.version import VERSION

# Files that modules read, by the module.
DATA = {"tfod.labels": ["labels_coco.txt"], "fonts.label_font": ["fonts/DejaVuSans.ttf"]}


def copy_needed(module, folder):
    """Copies the project's modules that the file `module` imports, within functions too, into `folder`, with the version."""
    finder = modulefinder.ModuleFinder([str(ROOT)])  # elsewhere it does not look: other packages are not followed
    finder.run_script(str(module))
    for name, found in finder.modules.items():
        if name == "__main__" or not found.__file__:  # the file itself, and what is built into Python
            continue
        for path in [Path(found.__file__), *(ROOT / file for file in DATA.get(name, []))]:
            target = Path(folder) / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (Path(folder) / "VERSION").write_text(f"{VERSION}\n", encoding="utf-8")
