#!/usr/bin/env bash
# The entry point of the images: the model server on the stock image's ports and paths. Arguments go to the server.

set -euo pipefail

# exec: the server gets the signals, and ends when it is told to.
exec tensorflow_model_server --port=8500 --rest_api_port=8501 \
  --model_name="${MODEL_NAME}" --model_base_path="${MODEL_BASE_PATH}/${MODEL_NAME}" "$@"
