simpletuner train example=qwen_image.edit-v1-lora
# 或
simpletuner train example=qwen_image.edit-v2-lora
