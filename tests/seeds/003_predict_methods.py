setup_predict()                         # 设置预测模式
predict(image, prompt, negative_prompt, ...) # 图像生成预测
