#!/usr/bin/env bash
exec bash "$(dirname "$0")/../detection/demo.sh" segmentation # `make demo-segmentation` calls it
