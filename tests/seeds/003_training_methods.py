fit(train_dataloader)                    # 主训练循环
training_step(batch)                     # 单步训练
_training_step_cached(batch)             # 使用缓存的训练步骤
_training_step_compute(batch)            # 实时计算的训练步骤
_compute_loss(...)                       # 损失计算
save_checkpoint(epoch, global_step)     # 保存检查点
