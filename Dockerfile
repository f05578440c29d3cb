# vismt on a CPU: the two commands of README.md.
#
#   docker build -t vismt .
#   docker run --rm -v "$PWD/runs:/study/runs" vismt               # the quick start
#   docker run --rm -v "$PWD:/study" vismt vismt run my_study.yaml
#
# On Linux torch brings several gigabytes of CUDA. Give the index of its builds for CPUs to leave them out:
#   docker build --build-arg TORCH_INDEX=URL -t vismt .
FROM python:3.12-slim
ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
COPY . /vismt
RUN cd /vismt && pip install --no-cache-dir ".[quickstart]"
RUN useradd --create-home user && mkdir /study && chown user /study
USER user
WORKDIR /study
CMD ["vismt", "run", "quickstart"]
