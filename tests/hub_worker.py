"""Commands of `clla` in a process whose huggingface_hub knows another Hub: that is read when it is imported.

Reads one JSON object a line, {"arguments": […], "token": … or null}, and answers with exit code, stdout and stderr of
the command.
"""

from __future__ import annotations

import json
import os
import sys

from typer.testing import CliRunner

import clla
from clla.cli import app

clla.register()
for line in sys.stdin:
    asked = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if asked["token"] is not None:
        os.environ["HF_TOKEN"] = asked["token"]
    done = CliRunner().invoke(app, asked["arguments"])
    raised = done.exception if done.exception is not None and not isinstance(done.exception, SystemExit) else None
    found = {"exit_code": done.exit_code, "stdout": done.stdout, "stderr": done.stderr, "raised": repr(raised)}
    print(json.dumps(found), file=sys.__stdout__, flush=True)
