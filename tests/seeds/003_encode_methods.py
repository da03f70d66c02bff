# 编码解码方法
encode_image_embedding(image, device)           # 编码图像
encode_prompt_image_embedding(prompt, image, device) # 编码prompt+图像
decode_vae_latent(latents)                      # 解码VAE潜在向量
