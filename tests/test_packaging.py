"""The wheel carries recipes and DeepSpeed configurations."""

import subprocess
import sys
import zipfile

from conftest import REPO


def test_the_wheel_carries_recipes_and_deepspeed_configs(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        tmp_path,
        REPO,
    ]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("medvlm-*.whl"))).namelist()
    for folder, pattern in (("medvlm/recipes", "*.yaml"), ("ds_configs", "*.json"), ("data_prep", "*.py")):
        for file in (REPO / folder).glob(pattern):
            assert f"{folder}/{file.name}" in names
