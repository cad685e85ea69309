#!/usr/bin/env bash
# transformers 5.24.0: one directory may hold chat templates in chat_template.json and in
# chat_template.jinja (saving a changed template into an older directory leaves both). Processors
# take the one of chat_template.json, tokenizers that of chat_template.jinja: two objects loaded
# from one directory write different prompts, without a warning.
# Seen with Python 3.11, transformers 5.24.0:
#   tokenizer: 'from jinja'
#   processor: 'from json'
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'transformers==5.24.0' 'pillow==12.3.0' 'numpy==2.4.6' 'jinja2==3.1.6'
"$folder/venv/bin/python" -W ignore - "$folder" <<'PY'
import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llava.processing_llava import LlavaProcessor

print("transformers", transformers.__version__)
directory = Path(sys.argv[1]) / "model"
words = {"<unk>": 0, "hello": 1}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
(directory / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
(directory / "chat_template.jinja").write_text("from jinja")
asked = [{"role": "user", "content": "hello"}]
tokenizer = AutoTokenizer.from_pretrained(directory)
found = {"tokenizer": tokenizer.apply_chat_template(asked, tokenize=False)}
settings, _ = LlavaProcessor.get_processor_dict(directory)
found["processor"] = settings.get("chat_template")
for who, template in found.items():
    print(f"{who}: {template!r}")
assert found == {"tokenizer": "from jinja", "processor": "from json"}, "changed"
PY
