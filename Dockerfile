# The package on a CPU, from Debian and the package index alone:
#
#     docker build -t vitadapter-zoo .
#     docker run --rm -v "$PWD:/data" vitadapter-zoo predict photo.jpg --model adapter-n-emoji
#     docker run --rm -p 127.0.0.1:7860:7860 vitadapter-zoo serve --host 0.0.0.0
#
# The index's torch for x86-64 brings CUDA's libraries. For a smaller image, take PyTorch's own index:
#
#     docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t vitadapter-zoo .
FROM debian:bookworm-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH=2.14.1
ARG TORCHVISION=0.29.1
ARG TORCH_INDEX=https://pypi.org/simple
RUN python3 -m venv /opt/zoo \
    && /opt/zoo/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" \
        torch==$TORCH torchvision==$TORCHVISION \
    && /opt/zoo/bin/pip install --no-cache-dir "setuptools>=77"
COPY pyproject.toml setup.py README.md LICENSE /source/
COPY csrc /source/csrc
COPY vitadapter_zoo /source/vitadapter_zoo
RUN VITADAPTER_ZOO_BUILD_OP=1 VITADAPTER_ZOO_CUDA=0 \
    /opt/zoo/bin/pip install --no-cache-dir --no-build-isolation "/source[web]"

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home zoo
COPY --from=build /opt/zoo /opt/zoo
USER zoo
WORKDIR /data
VOLUME /home/zoo/.cache
EXPOSE 7860
ENTRYPOINT ["/opt/zoo/bin/vitadapter-zoo"]
CMD ["--help"]
