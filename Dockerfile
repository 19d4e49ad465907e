# A small image for the CPU: the binary, ONNX Runtime's library, the shipped bundle. Set-up and build are those of `make`.
#
#   docker build -t midemb .
#   docker run -p 50051:50051 -p 9464:9464 midemb

FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip make g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /midemb
# Fetched files change rarely: their layer comes before the sources, so that it is reused.
COPY Makefile ./
COPY deploy/fetch.py deploy/
COPY models/default models/default
RUN make setup
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY clients/rust clients/rust
COPY src src
RUN make build && strip --strip-debug target/release/midemb

FROM debian:bookworm-slim
# Object stores speak TLS.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --no-create-home midemb
COPY --from=build /midemb/target/release/midemb /opt/midemb/bin/midemb
COPY --from=build /midemb/.runtime/lib/libonnxruntime.so /opt/midemb/lib/libonnxruntime.so
COPY --from=build /midemb/models/default /opt/midemb/models/default
COPY LICENSE /opt/midemb/LICENSE
COPY deploy/midemb.toml /opt/midemb/deploy/midemb.toml
# A pushed config is kept beside the config file.
RUN chown midemb /opt/midemb/deploy
ENV PATH=/opt/midemb/bin:$PATH \
    MIDEMB__SERVER__LISTEN=0.0.0.0:50051 \
    MIDEMB__TELEMETRY__METRICS_LISTEN=0.0.0.0:9464
USER midemb
EXPOSE 50051 9464
# SIGTERM drains: give it server.drain_seconds + 10 (`docker stop --time 40`).
STOPSIGNAL SIGTERM
ENTRYPOINT ["midemb"]
CMD ["serve", "--config", "/opt/midemb/deploy/midemb.toml"]
