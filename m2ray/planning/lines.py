"""A plan in the terminal, its end: what is captured and written, and how fast, in lines; and resources in words."""

from collections.abc import Iterator

from m2ray.planning.plan import Plan
from m2ray.sites import shown_layers
from m2ray.sizes import bytes_in_words


def site_lines(plan: Plan) -> Iterator[str]:
    """What is captured where, its bytes a token before any compression, and which layers have nothing of the kind."""
    options, table = plan.demand.options, plan.demand.table
    for number, (site, layers) in enumerate(options.sites.items()):
        token_bytes = sum(part.row_bytes for part in options.parts if part.site == site)
        lacking = shown_layers(
            layer for layer in range(table.num_layers) if layer not in table.layers_of.get(site, range(table.num_layers))
        )
        where = f" of layers {shown_layers(layers)}" if layers else ""
        yield f"{'' if number else 'capture':<9}{site}{where}: {token_bytes:,} bytes a token" + (
            f"; layers {lacking} have none" if layers and lacking else ""
        )


def output_lines(plan: Plan) -> Iterator[str]:
    """What the prompts come to and what is written of them; nothing where none are known."""
    output, prompts = plan.output, plan.prompts
    if output is None or prompts is None:
        return
    yield f"output   {prompts.tokens:,} tokens of {prompts.sequences:,} prompts; padding {prompts.padding_waste:.1%}"
    if plan.demand.options.prompts.limit is not None:
        yield f"         limit = {plan.demand.options.prompts.limit:,}: what comes after so many rows of the prompts is left out"
    if plan.demand.options.prompts.keep_columns:
        yield f"         kept in sequences/: {', '.join(plan.demand.options.prompts.keep_columns)}"
    if output.rows < prompts.tokens:
        chosen = plan.demand.options.prompts.selection
        yield f"         {output.rows:,} rows of {chosen} in each site and layer: {bytes_in_words(output.saved_bytes)} less than of all"
    for site in plan.demand.options.sites if output.by_part else ():
        of_site = [num_bytes for part, num_bytes in output.by_part.items() if part.site == site]
        yield f"         {site}: {bytes_in_words(sum(of_site))} in {len(of_site) * prompts.shards:,} files"
    if output.statistics_bytes:
        yield f"         statistics in up to {bytes_in_words(output.statistics_bytes)}"
    yield f"         {output.num_bytes:,} bytes in {output.files:,} files; with records {bytes_in_words(output.disk_bytes)}"
    if output.cost_a_month is not None:
        yield f"         {_amount(output.cost_a_month)} a month at {plan.demand.assumed.price_per_gb_month:g} a GB"


def rate_lines(plan: Plan) -> Iterator[str]:
    """How fast, what allows how much, how long it takes and what that costs; nothing where the speed is not known."""
    rates = plan.rates
    if rates.tokens_per_s is None or rates.store_bytes_per_s is None:
        return
    source = "as stated" if rates.is_stated else "from the profile" if rates.is_measured else "estimated"
    yield f"speed    {rates.tokens_per_s:,.0f} tokens/s of computation ({source})"
    yield f"         at that rate the store must take {bytes_in_words(rates.store_bytes_per_s)}/s"
    for name, tokens_per_s in rates.limits.items():
        if name != "computation":
            yield f"         {in_words(name)} allows {tokens_per_s:,.0f} tokens/s"
    if rates.filled_share is not None and not rates.is_stated and rates.limiting != "store":
        yield f"         filling and draining the chains takes {1 - rates.filled_share:.1%} of the time"
    if rates.duration_s is not None:
        yield f"         about {_duration(rates.duration_s)}"
    if rates.gpu_cost is not None and rates.gpu_hours is not None:
        price = plan.demand.assumed.price_gpu_hour
        yield f"         {_amount(rates.gpu_cost)} for {_amount(rates.gpu_hours)} GPU hours at {price:g} each; loading is not counted"


def _amount(number: float) -> str:
    """An amount of money, or of hours, to the hundredth."""
    return f"{number:,.2f}" if number >= 0.01 else "less than 0.01"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


_WORDS = {
    "gpu_memory": "GPU memory",
    "host_memory": "host memory",
    "shared_memory": "shared memory (/dev/shm)",
    "disk": "disk space",
    "computation": "the computation",
    "device_to_host_copy": "the copy from GPU to host",
    "offload": "the copy of layers that are not kept on the GPUs",
    "encoder": "the encoding of Parquet",
    "store": "the store",
}


def in_words(resource: str) -> str:
    """A resource that is short, or that limits a run, for people."""
    return _WORDS[resource]
