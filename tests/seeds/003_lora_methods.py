# LoRA相关方法
set_lora()           # 设置LoRA配置
load_lora(path)      # 加载LoRA权重
save_lora(path)      # 保存LoRA权重
merge_lora()         # 合并LoRA权重

# 量化方法
quantize_model(model, device)  # FP8量化
