#!/usr/bin/env bash
# The health check of the images: does the server at port 8501 (or $1) have a version of ${MODEL_NAME} that answers?
# Bash alone, as the image has no curl.

set -euo pipefail

exec 3<>"/dev/tcp/127.0.0.1/${1:-8501}"
printf 'GET /v1/models/%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "${MODEL_NAME}" >&3
grep --quiet '"state": *"AVAILABLE"' <&3
