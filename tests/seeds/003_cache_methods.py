cache_embeddings(train_dataloader)      # 预计算并缓存embeddings
cache_step(batch, vae_device, text_device) # 单步缓存处理
_encode_empty_prompt(image, device)     # 编码空提示
