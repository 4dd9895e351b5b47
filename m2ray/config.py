"""ExtractConfig: the options of an extraction, in one place, for TOML files and command-line flags alike."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from m2ray.errors import ConfigError, did_you_mean, raise_all
from m2ray.option_text import CHOICES, SiteName, parse_labels, parse_tokens
from m2ray.option_types import (
    Attention,
    Auto,
    Day,
    Encoding,
    Names,
    NonEmpty,
    Number,
    OffloadTo,
    Positive,
    Seconds,
    Sites,
    Threads,
    Transport,
    Weights,
    as_object,
)
from m2ray.sizes import parse_bytes, parse_max_memory

_DECIDES_ROWS: dict[str, Any] = {"decides_rows": True}


def _rows(default: Any = ..., *, description: str) -> Any:
    """An option that decides the rows."""
    return Field(default, description=description, json_schema_extra=_DECIDES_ROWS)


class ExtractConfig(BaseModel):
    """One extraction as a user asks for it. Frozen; unknown keys are refused.

    Options made by `_rows` decide the rows and are kept in job.json; the others may change between a run and its resume.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    model: NonEmpty = _rows(
        description="Checkpoint folder: config.json, tokenizer, safetensors and their index; or OWNER/NAME@REVISION of the Hugging Face cache."
    )
    prompts: NonEmpty = _rows(
        description="Prompt file, folder or glob: JSON, JSONL, Parquet, Arrow, CSV, TSV, text; also .gz, .zst; or a Hugging Face dataset's folder, or its OWNER/NAME in the cache."
    )
    split: NonEmpty | None = _rows(None, description="The split of a dataset's folder that has several, such as train.")
    encoding: Encoding = _rows(
        "utf-8", description="What text files are written in: gb18030, utf-16, shift_jis, cp1252 ...; nothing is guessed."
    )
    text_column: NonEmpty | None = _rows(None, description="Column that holds a prompt's text; default: text, if it alone is there.")
    messages_column: NonEmpty | None = _rows(
        None,
        description="Column that holds a prompt's chat messages, for the chat template; default: messages or conversations, if it alone is there.",
    )
    input_ids_column: NonEmpty | None = _rows(
        None, description="Column that holds a prompt's token ids, which are taken as they are; default: input_ids, if it alone is there."
    )
    tools_column: NonEmpty | None = _rows(None, description="Column that holds the tools of a chat; default: tools, where it is.")
    id_column: NonEmpty | None = _rows(None, description="Column that names a row; default: its position.")
    keep_columns: Names | None = _rows(
        None, description='Columns of the prompts that travel into sequences/, such as labels: "label,topic"; default: none.'
    )
    limit: Positive | None = _rows(None, description="The first prompts alone, so many, for a try; default: all.")
    max_length: Positive | None = _rows(None, description="Longest sequence in tokens; default: the model's own limit.")
    truncation: Literal["refuse", "cut", "cut_left"] = _rows(
        "refuse", description="Longer prompts: quarantine them, or cut their end, or their beginning (cut_left)."
    )
    pack: Annotated[int, Field(ge=2, lt=1 << 63), Number] | None = _rows(
        None, description="Join prompts, with BOS between, and cut them into sequences of so many tokens, as dictionary trainers do."
    )
    special_tokens: Literal["auto", "add", "none"] = _rows(
        "auto", description="Those that the tokenizer puts around a text (never around a chat); auto: where the text has them not already."
    )
    add_generation_prompt: bool = _rows(False, description="End each chat with what its template writes before an assistant's answer.")
    chat_template: NonEmpty | None = _rows(
        None, description="File with a Jinja template for chats, as a path or URL; default: the model's own template."
    )
    template_options: Annotated[dict[str, Any], BeforeValidator(as_object)] = _rows(
        {}, description="For every chat's template: {enable_thinking = false} in TOML, JSON as a flag; a row's chat_template_kwargs win."
    )
    mask: Literal["assistant"] | None = _rows(
        None, description="Loss mask of chats: assistant for the tokens that the assistant says; default: none. Token ids bring their own."
    )
    template_date: Day | Auto = _rows("auto", description="The day that chat templates are told; auto: the UTC day on which the run began.")
    template_timeout_s: Seconds = _rows(
        10.0, description="Seconds of the processor that a chat template may take for a row; rows that take longer are quarantined."
    )
    layers: NonEmpty = _rows("all", description='Layers of sites that name none: "all", "0", "0-5", "0,7,20-61".')
    sites: Sites = _rows(
        "residual",
        description=f'What to capture: {", ".join(get_args(SiteName))}; several with layers of their own: "residual:all, mlp:0,20-30, final_norm".',
    )
    tokens: NonEmpty = _rows("all", description=f"Tokens whose rows are kept: {CHOICES}. mask: by the loss mask; mean: one row a sequence.")
    skip_special_tokens: bool = _rows(False, description="Never choose the tokenizer's special tokens.")
    statistics: NonEmpty | None = _rows(
        None, description='What to sum up of the rows: "moments:all, norms:all, experts:all, covariance:20,30"; default: nothing.'
    )
    keep: Literal["rows", "statistics", "both"] | Auto = _rows(
        "auto", description="What is stored: rows, their statistics alone, or both; auto: both where statistics are asked for."
    )
    compute_dtype: Literal["bfloat16", "float16", "float32", "float8"] = _rows(
        "bfloat16", description="Dtype of weights and arithmetic; float8: FP8 checkpoints as served, products alone (docs/numerics.md)."
    )
    store_dtype: Literal["bfloat16", "float16", "float32", "float8", "int8"] = _rows(
        "bfloat16",
        description="Dtype of the stored rows of hidden width; float8 and int8: about half of the bytes, with a scale for 128 channels.",
    )
    batch_tokens: Positive | Auto = _rows(
        "auto", description="Padded tokens in a micro-batch, at most; auto: what memory and prompts suit best, up to 32768."
    )
    shard_tokens: Positive | Auto = _rows(
        "auto", description="Tokens in a shard, the unit of commit and resume; auto: 32768, or more where statistics alone are kept."
    )
    attn_implementation: Attention = _rows("auto", description="auto: sdpa where the family has it.")
    compile: bool | Auto = _rows(
        "auto", description="Compile the layers: faster on a GPU (docs/performance.md); auto: where there are GPUs."
    )
    threads_per_stage: Threads | Auto = _rows(
        "auto", description="torch threads a stage on the CPU; auto: OMP_NUM_THREADS, or its node's cores / its node's stages."
    )

    output: NonEmpty = Field(description="Run folder, new or to be resumed.")
    compression: Literal["none", "planes"] = Field(
        "none", description="Stored rows: as they are, or lossless in about 0.7 (bfloat16) or 0.9 (float16) of the bytes."
    )
    quarantine_limit: Annotated[float, Field(ge=0, le=1), Number] = Field(
        0.5, description="Share of the rows that may be quarantined; beyond it nothing is run, and the reasons are counted."
    )
    stages: Positive | Auto = Field("auto", description="Stage actors; auto: one a GPU of the cluster, 1 without GPUs.")
    replicas: Positive | Auto = Field(1, description="Chains over one queue of shards; auto: as many as the GPUs hold.")
    gpus_per_stage: Positive = Field(1, description="GPUs that one stage owns.")
    device_map: NonEmpty = Field("auto", description="auto, balanced, balanced_low_0, sequential, cuda:0.")
    max_memory: NonEmpty | None = Field(
        None, description='Of each GPU, or of each stage where there is none: "40GB", "0:60GB,1:40GB", "node-a=40GB;node-b=60GB".'
    )
    weights: Weights = Field(
        "auto", description="Quantised weights: bf16: unpacked once; packed: as on disk, unpacked as they are used; auto: bf16 if all fits."
    )
    offload: OffloadTo = Field(
        "none",
        description="Layers that find no room: refused; cpu: packed in host memory; disk: read from the checkpoint each time; auto: in memory first.",
    )
    offload_folder: NonEmpty | None = Field(
        None, description="Folder on a fast disk of each node, to which layers that are read each time are copied first; default: no copy."
    )
    node_labels: NonEmpty | None = Field(None, description='Use only nodes with these Ray labels: "zone=a,kind=h100".')
    in_flight: NonEmpty = Field("4GiB", description="Hidden states between the stages at one time, at most.")
    transport: Transport = Field("auto", description="Hidden states between GPUs of a node: directly (cuda_ipc), or through the host.")
    placement_timeout_s: Seconds = Field(30.0, description="Seconds to wait for room in the cluster.")
    stage_timeout_s: Seconds = Field(1800.0, description="Seconds without any progress after which silent stages are restarted.")
    ray: bool = Field(
        False, description="Start Ray, and a process for the stage, where one stage without a GPU would run in the driver's own process."
    )
    wait: bool = Field(False, description="Another driver is at the run: wait for its end; else it is refused.")
    chain: NonEmpty | None = Field(None, description="Run on the warm chain of this name (`m2ray serve`), which has the model loaded.")

    @classmethod
    def row_options(cls) -> tuple[str, ...]:
        """The options that decide the rows, in declaration order: `job.json` holds them resolved."""
        return tuple(name for name, field in cls.model_fields.items() if field.json_schema_extra == _DECIDES_ROWS)

    @classmethod
    def from_sources(cls, toml_path: Path | None, flags: Mapping[str, Any]) -> Self:
        """Read a TOML file, if any, lay the flags that were given over it, and validate the whole.

        Raises:
            ConfigError: naming every unknown, missing or malformed option at once.
        """
        values = {**(_read_toml(toml_path) if toml_path else {}), **flags}
        return cls.validated(values)

    @classmethod
    def validated(cls, values: Mapping[str, Any]) -> Self:
        """Validate a mapping of option names to values (strings are parsed). Raises ConfigError."""
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            raise_all(_as_problems(cls, error))
            raise
        raise_all(list(_contradictions(config)))
        return config


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def _contradictions(config: ExtractConfig) -> Iterator[ConfigError]:
    """Values that have a form of their own and lack it, and such as do not go together."""
    for parse in (
        lambda: parse_bytes(config.in_flight, "in_flight"),
        lambda: parse_max_memory(config.max_memory),
        lambda: parse_labels(config.node_labels),
        lambda: parse_tokens(config.tokens),
    ):
        try:
            parse()
        except ConfigError as problem:
            yield problem
    if config.offload_folder is not None and config.offload in ("none", "cpu"):
        yield ConfigError(
            f'offload_folder = {config.offload_folder!r}, and offload = "{config.offload}" puts nothing there.',
            'Set offload = "disk" or "auto", or leave offload_folder out.',
        )
    if config.keep in ("statistics", "both") and config.statistics is None:
        yield ConfigError(
            f'keep = "{config.keep}", and there are no statistics to keep.', 'Set statistics = "moments:all", or leave keep out.'
        )
    if config.keep == "rows" and config.statistics is not None:
        what = f'keep = "rows", and statistics = {config.statistics!r} would be taken for nothing.'
        yield ConfigError(what, 'Set keep = "both" or "statistics", or leave statistics out.')
    if config.compression == "planes" and config.store_dtype not in ("bfloat16", "float16"):
        what = f'compression = "planes" splits 16-bit rows, and store_dtype = "{config.store_dtype}".'
        yield ConfigError(what, 'Store bfloat16 or float16, or set compression = "none".')
    if config.pack is not None and config.max_length is not None:
        yield ConfigError(
            f"pack = {config.pack} makes every sequence as long, and max_length = {config.max_length}.", "Leave max_length out."
        )
    if config.pack is not None and config.keep_columns is not None:
        yield ConfigError(
            f"pack = {config.pack} joins prompts, and keep_columns are of single ones.",
            "Leave one out: `documents` names a context's rows.",
        )
    if config.pack is not None and config.truncation != "refuse":
        yield ConfigError(
            f"pack = {config.pack} cuts where a sequence is full, and truncation = {config.truncation!r}.", "Leave truncation out."
        )


def _as_problems(config: type[BaseModel], error: ValidationError) -> list[ConfigError]:
    """One problem an option: a value that fits no member of a union is reported once, with what each member asks for."""
    by_option: dict[str, list[Any]] = {}
    for problem in error.errors():
        by_option.setdefault(".".join(str(part) for part in problem["loc"][:1]), []).append(problem)
    problems = []
    for name, reports in by_option.items():
        first = reports[0]
        if first["type"] == "extra_forbidden":
            problems.append(
                ConfigError(
                    f"There is no option {name!r}.",
                    f"{did_you_mean(name, config.model_fields)}The options are: {', '.join(config.model_fields)}.",
                )
            )
            continue
        description = config.model_fields[name].description or ""
        if first["type"] == "missing":
            problems.append(ConfigError(f"The option {name!r} is missing.", description))
            continue
        wanted = " or ".join(str(report["msg"]).removeprefix("Input should be ").removeprefix("Value error, ") for report in reports)
        problems.append(ConfigError(f"{name} = {first['input']!r} is not {wanted}.", description))
    return problems
