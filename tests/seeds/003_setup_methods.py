setup_accelerator()    # 初始化加速器和混合精度
set_lora()            # 配置LoRA训练参数
configure_optimizers() # 配置优化器和学习率调度器
