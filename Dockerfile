# Two ways to the same images:
#   docker build --build-arg BINARIES=prebuilt --target operator .   packs what scripts/images put into dist/
#   docker build --build-arg BINARIES=build --target operator .      compiles in the first stage: for machines without Rust;
#                                                                    no test builds this way
# Buildah 1.28 (Debian 12) needs the argument spelled out also where it is the default.
ARG BINARIES=build

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bins -p ernie-operator -p ernie-worker \
    && for binary in ernie-operator ernie-worker; do strip -o /$binary target/*/release/$binary; done

FROM scratch AS prebuilt
COPY dist/ernie-operator dist/ernie-worker /

FROM ${BINARIES} AS binaries

FROM scratch AS operator
ARG VERSION=dev
LABEL org.opencontainers.image.title="ernie-operator" \
      org.opencontainers.image.description="Kubernetes operator that serves ERNIE 4.5 models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=binaries /ernie-operator /ernie-operator
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/ernie-operator"]

FROM scratch AS worker
ARG VERSION=dev
LABEL org.opencontainers.image.title="ernie-worker" \
      org.opencontainers.image.description="Inference worker for ERNIE 4.5 models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=binaries /ernie-worker /ernie-worker
USER 65532:65532
EXPOSE 8033 8080
ENTRYPOINT ["/ernie-worker"]
