accelerate launch lora/train_dreambooth_lora.py \
  --pretrained_model_name_or_path="runwayml/stable-diffusion-v1-5" \
  --instance_data_dir="data/single_images" \
  --output_dir="lora_ckpt/dreambooth" \
  --instance_prompt="a photo of [cls]" \
  --resolution=512 \
  --train_batch_size=1 \
  --max_train_steps=200 \
  --learning_rate=2e-4 \
  --lora_rank=16
