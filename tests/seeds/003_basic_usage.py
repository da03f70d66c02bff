from qwen_image_edit_trainer import QwenImageEditTrainer
from data.config import load_config_from_yaml

# 加载配置
config = load_config_from_yaml("configs/qwen_image_edit_config.yaml")

# 创建trainer
trainer = QwenImageEditTrainer(config)

# 训练
trainer.fit(train_dataloader)

# 预测
trainer.setup_predict()
image = trainer.predict(prompt_image, prompt)

# 缓存
trainer.cache_embeddings(train_dataloader)
