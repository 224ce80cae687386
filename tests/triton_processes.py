"""Triton kernels compiled in a process of their own: under TRITON_INTERPRET=1 there is nothing to compile."""
import os
import subprocess
import sys
from pathlib import Path


def compiles_without_spills(*arguments):
    """Runs tests.triton_aot with these arguments; AssertionError where it fails."""
    done = subprocess.run([sys.executable, "-m", "tests.triton_aot", *arguments], cwd=Path(__file__).parent.parent,
                          env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
