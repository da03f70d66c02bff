simpletuner train \
  --config config/config.json \
  --data config/qwen_edit/multidatabackend.json
