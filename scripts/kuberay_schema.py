"""Checks cluster/kuberay/rayjob.yaml against KubeRay's own schema and keeps, for the tests, the part of it that the file uses.

    python scripts/kuberay_schema.py CRD VERSION

CRD is `ray-operator/config/crd/bases/ray.io_rayjobs.yaml` of KubeRay's repository (ray-project/kuberay) at the tag VERSION: 1.4 MB,
nearly all of them Kubernetes' description of a pod. A cluster drops a field that it does not know without a word, so here one is an error.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

REPOSITORY = Path(__file__).parents[1]
RAYJOB = REPOSITORY / "cluster/kuberay/rayjob.yaml"
EXCERPT = REPOSITORY / "tests/data/kuberay/rayjob_schema.json"

Schema = dict[str, Any]


def served_schema(crd: Schema, api_version: str) -> Schema:
    """What a cluster holds an object of `api_version` ("ray.io/v1") against. Raises LookupError where the CRD does not serve it."""
    for version in crd["spec"]["versions"]:
        if version["served"] and f"{crd['spec']['group']}/{version['name']}" == api_version:
            schema: Schema = version["schema"]["openAPIV3Schema"]
            return schema
    message = f"{crd['metadata']['name']} serves no {api_version}."
    raise LookupError(message)


def part_used(schema: Schema, values: list[Any]) -> Schema:
    """`schema` without what none of `values` has; a field that it then does not name is an error."""
    part = {
        name: value for name, value in schema.items() if name not in {"description", "properties", "items"} and not name.startswith("x-")
    }
    if "properties" in schema:
        fields = sorted({name for value in values for name in value} & schema["properties"].keys())
        part["properties"] = {
            name: part_used(schema["properties"][name], [value[name] for value in values if name in value]) for name in fields
        }
        part["additionalProperties"] = False
    if "items" in schema:
        part["items"] = part_used(schema["items"], [item for value in values for item in value])
    return part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crd", type=Path)
    parser.add_argument("version", help="KubeRay's, for example 1.7.0")
    arguments = parser.parse_args()
    rayjob = yaml.safe_load(RAYJOB.read_text())
    crd = yaml.safe_load(arguments.crd.read_text())
    part = part_used(served_schema(crd, rayjob["apiVersion"]), [rayjob])
    problems = [f"{problem.json_path}: {problem.message}" for problem in Draft7Validator(part).iter_errors(rayjob)]
    if problems:
        sys.exit("\n".join(problems))
    source = f"Part of ray.io_rayjobs.yaml of KubeRay {arguments.version} (Apache-2.0), made by scripts/kuberay_schema.py."
    EXCERPT.parent.mkdir(exist_ok=True)
    EXCERPT.write_text(json.dumps({"$comment": source, **part}, indent=1, sort_keys=True) + "\n")
    print(f"{RAYJOB.name} is a RayJob of KubeRay {arguments.version}.")


if __name__ == "__main__":
    main()
