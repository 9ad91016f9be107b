"""The demo behind tools/demo.sh: trains, exports, predicts from a fresh process. Nothing that the study needs."""
