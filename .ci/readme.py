"""Prints the shell commands of a Markdown file: every ```bash block, in order."""

import re
import shlex
import sys
from pathlib import Path

for block in re.findall(r"^```bash\n(.*?)^```", Path(sys.argv[1]).read_text(), re.S | re.M):
    for line in block.splitlines():
        if line.strip() and not line.startswith("#"):
            shown = shlex.quote(f"$ {line}")
            print(f"printf '\\n%s\\n' {shown}\n{line}\nprintf '(%s s)\\n' $SECONDS; SECONDS=0")
