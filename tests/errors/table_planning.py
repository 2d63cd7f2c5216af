"""Plans, dry runs, examinations and studies of what cannot be."""

from __future__ import annotations

from errors.rows import Row, write

ROWS = [
    Row("plan nothing", "plan", "", ("give a model",)),
    Row("plan a model that is not there", "plan", "./gone", ("./gone", "no such folder")),
    Row("plan for no GPU", "plan", "tiny --gpus 0", ("--gpus", "above 0")),
    Row("plan a batch that cannot be shared", "plan", "tiny --gpus 8 --batch 9", ("--batch 9", "8 GPUs", "multiple")),
    Row("plan an unknown setting", "plan", "tiny --adapter.rnk 2", ("--adapter.rnk", "Did you mean adapter.rank")),
    Row("plan for a GPU that is too small", "plan", "tiny --gpus 1 --gpu-memory 0.001", ("GiB",)),
    Row("plan a length of 0", "plan", "tiny --length 0", ("--length", "0")),
    Row("plan a text for a number", "plan", "tiny --gpus eight", ("--gpus", "'eight'"), status=2),
    Row(
        "dry run of a model that is not there",
        "train",
        "--dry-run --model.name_or_path ./gone",
        ("./gone", "no such folder"),
    ),
    Row("doctor without a size", "doctor", "--megabytes 0", ("--megabytes", "1 or more")),
    Row("doctor of an unknown option", "doctor", "--fix", ("--fix", "unrecognized"), status=2),
    Row("begin in a folder with files", "init", ".", ("not empty", "new folder"), write("notes.txt", "")),
    Row("begin nowhere", "init", "", ("folder",), status=2),
    Row("compare nothing", "compare", "study.json --output out", ("study.json", "no such file")),
    Row(
        "compare a study that is no JSON",
        "compare",
        "study.json --output out",
        ("study.json", "not JSON"),
        write("study.json", "{"),
    ),
    Row(
        "compare a study that is a list",
        "compare",
        "study.json --output out",
        ("study.json", "object"),
        write("study.json", "[]"),
    ),
    Row(
        "compare an unknown key",
        "compare",
        "study.json --output out",
        ("variant", "Did you mean variants"),
        write("study.json", {"variant": {}, "seeds": [1]}),
    ),
    Row("compare with no job", "compare", "study.json --output out --jobs 0", ("--jobs", "1 or more", "0")),
]
