"""links.py IMAGES ANNOTATIONS FOLDER FILE TIMES: so many links to each image in a folder, and annotations of all of them."""

import json
import sys
from pathlib import Path


def main(images, annotations, folder, file, times):
    dataset = json.loads(Path(annotations).read_text())
    entries, notes = {entry["file_name"]: entry for entry in dataset["images"]}, {}
    for note in dataset["annotations"]:
        notes.setdefault(note["image_id"], []).append(note)
    made = {"images": [], "annotations": []}
    Path(folder).mkdir(exist_ok=True)
    for turn in range(int(times)):
        for path in sorted(Path(images).iterdir()):
            name, number = f"{turn:03d}_{path.name}", len(made["images"]) + 1
            (Path(folder) / name).symlink_to(path)
            made["images"].append({**entries[path.name], "id": number, "file_name": name})
            for note in notes.get(entries[path.name]["id"], []):
                made["annotations"].append({**note, "id": len(made["annotations"]) + 1, "image_id": number})
    Path(file).write_text(json.dumps({**dataset, **made}))


if __name__ == "__main__":
    main(*sys.argv[1:])
