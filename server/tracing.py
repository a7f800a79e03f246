"""Requests as OpenTelemetry spans, by OTLP over HTTP. The extra `otel`; imported only where an endpoint is set.

A request's spans are made when it has ended, of the moments that the engine noted anyway: nothing is traced while it
runs, and nothing at all is done without an endpoint. The library sends them from a thread of its own, and drops what it
cannot send. Attributes `gen_ai.*` are those of the semantic conventions, `terrace.*` our own; prompts are in none.
"""

from __future__ import annotations

import importlib
from typing import Any

from server.errors import ConfigError
from server.explain import Explanation

NANOSECONDS = 10**9


class Tracer:
    """A sink of explanations. `close` sends what is left."""

    def __init__(
        self, exporter: Any, model_name: str, version: str, wall_offset_s: float, *, batched: bool = True
    ) -> None:
        """`exporter`: a SpanExporter. `wall_offset_s`: from the engine's clock to Unix time. Not `batched`: every span
        is exported as it ends."""
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        context = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
        self._trace = importlib.import_module("opentelemetry.trace")
        resource = resources.Resource.create({"service.name": "terrace", "service.version": version})
        self._provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = export.BatchSpanProcessor if batched else export.SimpleSpanProcessor
        self._provider.add_span_processor(processor(exporter))
        self._tracer = self._provider.get_tracer("terrace", version)
        self._propagator = context.TraceContextTextMapPropagator()
        self._model_name = model_name
        self._offset_s = wall_offset_s

    def __call__(self, one: Explanation) -> None:
        parent = self._propagator.extract({"traceparent": one.trace_parent}) if one.trace_parent else None
        root = self._tracer.start_span(
            f"generate {self._model_name}",
            context=parent,
            kind=self._trace.SpanKind.SERVER,
            start_time=self._ns(one.arrival_s),
            attributes=self._attributes(one),
        )
        if one.error:
            root.set_status(self._trace.Status(self._trace.StatusCode.ERROR))
        inside = self._trace.set_span_in_context(root)
        for decision in one.report(self._offset_s)["decisions"]:
            at_s = one.arrival_s if one.admitted_s is None else one.admitted_s
            root.add_event("kv decision", decision, timestamp=self._ns(at_s))
        for name, start_s, end_s in one.stretches():
            self._tracer.start_span(name, context=inside, start_time=self._ns(start_s)).end(self._ns(end_s))
        root.end(self._ns(one.ended_s))

    def _attributes(self, one: Explanation) -> dict[str, Any]:
        found: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "terrace",
            "gen_ai.request.model": self._model_name,
            "gen_ai.usage.input_tokens": one.prompt_tokens,
            "gen_ai.usage.output_tokens": one.generated_tokens,
            "gen_ai.response.finish_reasons": [one.finish],
            "terrace.request_id": one.request_id,
            "terrace.preemptions": one.preemptions,
            "terrace.kv_restore_s": one.phases_s["kv_restore"],
        }
        found |= {f"terrace.prompt_tokens.{tier}": count for tier, count in one.served.items()}
        return found | {f"terrace.cached_but_computed.{reason}": count for reason, count in one.missed.items()}

    def _ns(self, moment_s: float) -> int:
        return int((moment_s + self._offset_s) * NANOSECONDS)

    def close(self) -> None:
        """Blocking, for a few seconds where nobody takes the spans."""
        self._provider.shutdown()


def otlp_exporter(endpoint: str) -> Any:
    """What sends spans to `endpoint`, e.g. http://collector:4318. Raises ConfigError where the extra is missing."""
    try:
        module = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise ConfigError(
            "otlp_endpoint needs OpenTelemetry: pip install 'terrace[otel]'", param="server.otlp_endpoint"
        ) from error
    return module.OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
