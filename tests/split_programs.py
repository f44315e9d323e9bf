"""Compile train steps for a target in a process of its own and print the split of their memory.

python tests/split_programs.py v5e:2x4 CONFIG '["mesh.fsdp=8"]' '["mesh.tensor=8"]'
"""

import json
import sys

from jaxlm import configfile
from jaxlm.hardware.target import parse_target
from jaxlm.program import make_program, trace_train_step
from jaxlm.xla import hlo, liveness


def split(config, target: str) -> liveness.Split:
    """The split of a config's train step."""
    program = make_program(config, parse_target(target).devices())
    compiled = trace_train_step(config, program).lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    return liveness.split_memory(hlo.parse(text), memory, program.layout, program.structure, config)


if __name__ == "__main__":
    for overrides in sys.argv[3:]:
        found = split(configfile.load(sys.argv[2], json.loads(overrides)), sys.argv[1])
        top = [one._asdict() for one in liveness.largest(found, 12)]
        print(json.dumps({"classes": found.classes, "code": found.code, "largest": top}))
