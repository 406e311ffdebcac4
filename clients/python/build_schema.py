"""Compiles the broker's schema into each wheel, as token_broker/schema.binpb."""

from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

REPOSITORY = Path(__file__).parents[2]
# Only the rules that the broker holds requests to: whoever uses this package has, or has not, others of that name.
RULES = {"buf/validate/validate.proto", "google/protobuf/descriptor.proto"}


class SchemaHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not (REPOSITORY / "third_party/buf/validate/validate.proto").exists():
            raise SystemExit(f"run 'make third_party/buf/validate/validate.proto' in {REPOSITORY} first")
        self.made = TemporaryDirectory()
        schema = Path(self.made.name, "schema.binpb")
        includes = [REPOSITORY / "proto", REPOSITORY / "third_party", files("grpc_tools") / "_proto"]
        arguments = [*(f"-I{i}" for i in includes), "--include_imports", f"--descriptor_set_out={schema}"]
        if protoc.main(["protoc", *arguments, "tokenbroker/v1/token_broker.proto"]) != 0:
            raise SystemExit("protoc does not take the schema: see above")
        compiled = FileDescriptorSet.FromString(schema.read_bytes())
        kept = [f for f in compiled.file if f.name not in RULES]
        for file in kept:
            file.DiscardUnknownFields()  # the rules
            file.dependency[:] = [d for d in file.dependency if d not in RULES]
        schema.write_bytes(FileDescriptorSet(file=kept).SerializeToString(deterministic=True))
        build_data["force_include"][str(schema)] = "token_broker/schema.binpb"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self.made.cleanup()
