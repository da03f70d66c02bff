# LoRA训练
trainer.set_lora()
trainer.fit(train_dataloader)
trainer.save_lora("/path/to/lora")

# 量化推理
trainer.quantize = True
trainer.setup_predict()
image = trainer.predict(prompt_image, prompt)

# 多GPU预测
# 配置文件中设置不同设备
# vae: cuda:0, text_encoder: cuda:1, transformer: cuda:2
