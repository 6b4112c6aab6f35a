"""Runs ComfyUI's main.py; it ends with the process that started it.

usage: launch_comfyui.py [--declare-torchvision-operators] path/to/ComfyUI/main.py [ComfyUI's options]

Standard input is a pipe held by the starting process: when that process ends, in whatever way, the pipe closes and the
server goes too.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from pathlib import Path


def end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    arguments = sys.argv[1:]
    if arguments[0] == "--declare-torchvision-operators":
        arguments = arguments[1:]
        from user_comfyui import declare_torchvision_operators

        declare_torchvision_operators()
    main = Path(arguments[0]).resolve()
    # main.py expects its own folder in the place of this script's: ours has no modules for it to find.
    sys.path[0] = str(main.parent)
    sys.argv = arguments
    os.chdir(main.parent)
    runpy.run_path(str(main), run_name="__main__")
