def predict(
    self,
    prompt_image: np.ndarray,
    prompt: str,
    negative_prompt: str = "",
    num_inference_steps: int = 20,
    true_cfg_scale: float = 4.0
) -> np.ndarray:
    # 支持多GPU设备分配，按config中的设置
