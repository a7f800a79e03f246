"""A short load by aiperf: every request is answered, and timed. Arguments: address, folder of a tokenizer, model."""

import json
import subprocess
import sys
from pathlib import Path

REQUESTS = 24

url, folder, model = sys.argv[1:]
found = Path(folder) / "aiperf"
command = [Path(sys.executable).parent / "aiperf", "profile", "--model", model, "--url", url]
load = ["--endpoint-type", "completions", "--streaming", "--concurrency", "4", "--request-count", str(REQUESTS)]
prompts = ["--tokenizer", folder, "--isl", "64", "--osl", "16", "--extra-inputs", "ignore_eos:true"]
subprocess.run([*command, *load, *prompts, "--ui", "none", "--output-artifact-dir", found], check=True)
[path] = found.rglob("profile_export_aiperf.json")
report = json.loads(path.read_text(encoding="utf-8"))
assert report["error_summary"] == [], report["error_summary"]
assert report["request_count"]["avg"] == REQUESTS, report["request_count"]
assert report["time_to_first_token"]["count"] == REQUESTS, report["time_to_first_token"]
