"""The README keeps its word: its own-method example compiles as it stands there and compresses, and its commands exist.

    python3 tests/test_readme.py BUILD         BUILD: the folder with llava.o, kernels.o, tokenizer.o; run from the repository's root
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile

from counting import check, finish



build, cc = sys.argv[1], os.environ.get("CC", "cc")
readme = open("README.md", encoding="utf-8").read()
section = readme[readme.index("### Write your own method"):]
section = section[:section.index("\n## ")]
blocks = re.findall(r"^```c\n(.*?)^```", section, re.S | re.M)
check(len(blocks) == 2, f"the section has {len(blocks)} blocks of C: a function and a row were expected")
function, row = blocks
name = re.search(r'\{ "(\w+)"', row).group(1)
code = [line for line in function.splitlines() if line.strip() and not line.strip().startswith("//")]
check(len(code) <= 16, f"the method has {len(code)} lines of code")

policies = open("policies.c", encoding="utf-8").read()
table = policies.index("// ----------------------------------------------------------------------------\n// the table:")
policies = policies[:table] + function + "\n" + policies[table:]
policies = policies.replace("    { 0 }\n};", row.rstrip() + "\n    { 0 }\n};", 1)
for names, lines in re.findall(r"^\|.*?\|.*?\| ((?:`\w+`(?:, )?)+) \| (\d+) \|", readme, re.M):     # the table of methods
    bodies = [re.search(rf"^static [^\n;]*\b{n}\([^\n]*\{{\n.*?^\}}$", policies, re.S | re.M) for n in re.findall(r"\w+", names)]
    check(all(bodies) and sum(b.group().count("\n") + 1 for b in bodies) == int(lines),
          f"{names}: {lines} lines, and policies.c has {[b and b.group().count(chr(10)) + 1 for b in bodies]}")
cuda = os.path.join(build, "kernels_cuda.o")
with tempfile.TemporaryDirectory() as tmp:
    source, program = f"{tmp}/policies.c", f"{tmp}/llava"
    open(source, "w", encoding="utf-8").write(policies)
    link = [cuda, "-L/usr/local/cuda/lib64", "-lcudart", "-lstdc++"] if os.path.exists(cuda) else []
    flags = shlex.split(os.environ.get("TEST_CFLAGS", "-O1"))
    p = subprocess.run([cc, "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", *flags, "-fopenmp", "-ffp-contract=off", "-Iinclude", source,
                        *(f"{build}/{o}.o" for o in ("llava", "kernels", "tokenizer")), *link, "-lm", "-o", program], capture_output=True, text=True)
    check(p.returncode == 0, f"it compiles: {p.stderr}")
    help_text = subprocess.run([program, "-p", "help"], capture_output=True, text=True).stdout
    check(re.search(rf"^\s*{name}\b", help_text, re.M) is not None, f"-p help lists {name}")
    for ratio in 0.3, 0.5, 0.8:
        p = subprocess.run([program, "models/scenes-llava.bin", "models/scenes/1001.png", "-p", name, "-r", str(ratio), "-n", "20"], capture_output=True, text=True)
        last = dict(pair.split() for pair in p.stderr.strip().splitlines()[-1].split("; ")) if p.returncode == 0 else {}
        check(p.returncode == 0 and p.stdout.strip(), f"-p {name} -r {ratio}: {p.stderr}")
        if last:
            kept, seen, new = float(last["slots_kept"]), float(last["slots_seen"]), int(last["new_tokens"])
            prompt = int(last["prompt_tokens"])
            check(abs(kept - (new - 1) - (1 - ratio) * prompt) < 0.1 * prompt and kept < seen, f"-p {name} -r {ratio}: {kept} slots of {seen} kept")

# every make target and program option that the README writes is there
makefile = open("Makefile", encoding="utf-8").read()
for target in sorted(set(re.findall(r"\bmake ([a-z]+)\b", readme))):
    check(re.search(rf"^{target}:", makefile, re.M) is not None, f"make {target}")
options = subprocess.run([f"{build}/llava", "-h"], capture_output=True, text=True).stdout
for line in re.findall(r"^\s+\./llava (.*)$", readme, re.M):
    for option in re.findall(r"(?<=\s)--?[a-zA-Z][a-z-]*", line.split("#")[0]):
        check(re.search(rf"(^|[\s,]){re.escape(option)}\b", options, re.M) is not None, f"./llava {option}")

finish()
