#!/usr/bin/env bash
# A vLLM server for rollouts on one GPU, training on the others: `bash examples/launch/vllm_server.sh`
# (`pip install "trl[vllm]"`). Not tested yet, because it needs two GPUs (docs/scaling.md).
#
# On several machines the server has its own machine: run the first command there, and the second on the others with
# --vllm_server_host HOST and the options of examples/launch/ddp.yaml. With vLLM 0.30 or newer add --enable-scale-out.
set -euo pipefail

recipe=examples/recipes/full_several_gpus.yaml
student=$(sed -n 's/^model_name_or_path: //p' "$recipe")

# The flags after --max-model-len are those that TRL's trainers need: the server takes new weights during training.
CUDA_VISIBLE_DEVICES=0 VLLM_SERVER_DEV_MODE=1 vllm serve "$student" --port 8000 --gpu-memory-utilization 0.9 \
    --max-model-len 4096 --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs \
    --max-logprobs -1 &
trap 'kill $!' EXIT

# The trainer waits up to vllm_server_timeout seconds for the server, and sends it the new weights after every step.
CUDA_VISIBLE_DEVICES=1,2,3 accelerate launch --config_file examples/launch/ddp.yaml --num_processes 3 \
    examples/opd.py --config "$recipe" --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
    --use_vllm --vllm_mode server --vllm_server_port 8000 --vllm_server_timeout 600
