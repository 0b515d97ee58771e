"""Answers that are no captions, in the languages and habits of current models; and true captions."""

import pytest

from captioning.config import CaptioningConfig, QualityConfig
from captioning.phrases import PHRASES
from captioning.quality import FLAGS, judge, other_script, strip_boilerplate
from errors import UserError
from pipelines.recipe import Recipe

QUALITY = QualityConfig()
# What speaks of an image; each language's own letters are asked for, too.
PROMPT = "Describe this image. 描述 説明してください 설명 опиши صف वर्णन อธิบาย"


def flags(text: str, quality: QualityConfig = QUALITY, *, prompt: str | None = PROMPT) -> set[str]:
    row = {"caption_raw": text, "finish_reason": "stop", "alt_text": None, "first_caption": None, "prompt": prompt}
    return set(judge(row, quality)["flags"])


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't identify people based on their appearance.",
        "I’m sorry, I can’t help with that request.",
        "I am unable to provide a description of this image.",
        "Unfortunately, I cannot view the image directly. A street is probable.",
        "As an AI language model, I have no eyes.",
        "A man stands on a stage. However, I can't identify the person in the picture.",
        "I have to say that the image itself is not visible to me.",
        "No image was provided. Please upload the image again.",
        "It seems there is no image attached.",
        "很抱歉，我无法查看您上传的图片。",
        "抱歉，我不能识别图片中的人物。",
        "對不起，我無法識別圖片中的人。",
        "作为一个人工智能，我没有眼睛。",
        "申し訳ありませんが、この画像の人物を特定することはできません。",
        "すみませんが、画像を見ることができません。",
        "죄송합니다. 저는 이미지 속 인물을 식별할 수 없습니다.",
        "죄송합니다. 이 사람을 식별할 수 없습니다.",
        "Lo siento, pero no puedo ayudar con eso.",
        "Je suis désolé, mais je ne peux pas identifier cette personne.",
        "Es tut mir leid, aber ich kann die Person nicht identifizieren.",
        "Ich kann keine Personen identifizieren.",
        "I won't be able to help with that.",
        "Desculpe, mas não posso identificar pessoas.",
        "Mi dispiace, ma non posso identificare le persone.",
        "Het spijt me, maar ik kan deze persoon niet identificeren.",
        "Przepraszam, ale nie mogę zidentyfikować tej osoby.",
        "Üzgünüm, ancak bu kişiyi tanımlayamam.",
        "Извините, но я не могу определить, кто на фотографии.",
        "Xin lỗi, tôi không thể nhận dạng người trong ảnh.",
        "Maaf, saya tidak dapat mengenali orang ini.",
        "ขออภัย ฉันไม่สามารถระบุตัวบุคคลได้",
        "ขออภัยค่ะ ไม่สามารถช่วยได้",
        "آسف، لكن لا أستطيع التعرف على الشخص.",
        "क्षमा करें, मैं इस व्यक्ति की पहचान नहीं कर सकता।",
    ],
)
def test_refusals_of_many_languages(text: str) -> None:
    assert "refusal" in flags(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here is a detailed description of the image: a red bus stands at a corner.",
        "Certainly! A red bus stands at a corner.",
        "Here's a brief caption: a red bus.",
        "The user has uploaded a picture of a bus.",
        "A red bus. Let me know if you need anything else!",
        "A red bus. Would you like me to describe the background?",
        "A red bus. I hope this description helps.",
        "In your image, a red bus stands at a corner.",
        "The image you've provided shows a bus.",
        "Got it, let's break this down. First, the bus: it is red.",
        "Here are my reasoning steps:\nThe bus is red.",
        "It looks like you haven't uploaded an image.",
        "A red bus. Is there anything else you would like to know?",
        "I'd be happy to try and describe the bus.",
        "In the provided image, a red bus stands at a corner.",
        "用户上传的图片中有一辆红色公交车。",
        "您上传的图片展示了一辆红色公交车。",
        "好的，以下是图片的描述：一辆红色公交车。",
        "一辆红色公交车停在街角。希望这个描述对你有帮助！",
        "もちろんです。赤いバスが停まっています。",
        "赤いバスが停まっています。お役に立てれば幸いです。",
        "물론입니다! 빨간 버스가 서 있습니다.",
        "¡Claro! Un autobús rojo está en la esquina.",
        "Un autobús rojo. Si necesitas más detalles, avísame.",
        "Bien sûr ! Voici une description : un bus rouge.",
        "Un bus rouge. N'hésitez pas à demander plus de détails.",
        "Natürlich! Ein roter Bus steht an der Ecke.",
        "Ein roter Bus. Lass mich wissen, wenn du mehr brauchst.",
        "Ein roter Bus. Wenn Sie weitere Fragen haben, stellen Sie sie.",
        "Claro! Um ônibus vermelho está na esquina.",
        "Конечно! Красный автобус стоит на углу.",
        "Красный автобус. Если у вас есть вопросы, спрашивайте.",
        "بالتأكيد! حافلة حمراء عند الزاوية.",
        "ज़रूर! एक लाल बस कोने पर खड़ी है।",
        "แน่นอน! รถบัสสีแดงจอดอยู่ที่มุมถนน",
    ],
)
def test_answers_to_somebody(text: str) -> None:
    assert "speaks_of_user" in flags(text)


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("A red bus, IMG_20190304.jpg, at a corner.", "file_name"),
        ("The filename suggests a bus: the file name is bus.", "file_name"),
        ('The image named "holiday" shows a bus.', "file_name"),
        ("DSC01234 shows a bus.", "file_name"),
        ("这张图片的文件名是公交车。", "file_name"),
        ("Имя файла говорит об автобусе.", "file_name"),
        ("**Image description:** a red bus.", "markup"),
        ("### Scene\nA red bus.", "markup"),
        ("- A red bus\n- A house", "markup"),
        ("1. A red bus\n2. A house", "markup"),
        ("A red bus.\n\t+ It is old.", "markup"),
        ("A red bus at a corner.\n\nKeywords: bus, corner", "markup"),
        ("<think>The image is of a bus.</think>A red bus.", "markup"),
        ("A red bus.<|im_end|>", "markup"),
        ("A red bus.<|im_end|", "markup"),
        ("A red bus.<end_of_utterance>", "markup"),
        ('{"caption": "a red bus"}', "markup"),
        ("ASSISTANT: A red bus.", "markup"),
        ("A red bus.\\nIt is old.", "markup"),
        ("A red bus stands at a corner. Overall, the image is calm.", "summary"),
        ("A red bus. The scene conveys a sense of calm.", "summary"),
        ("A red bus. The overall atmosphere is calm and joyful.", "summary"),
        ("一辆红色公交车。整体而言，画面很安静。", "summary"),
        ("赤いバスが停まっています。全体的に、静かな雰囲気です。", "summary"),
        ("一辆红色公交车。整體氛圍安静。", "summary"),
        ("Un bus rouge. Dans l’ensemble, la scène est calme.", "summary"),
        ("รถบัสสีแดงจอดอยู่ที่มุมถนน โดยรวมแล้วภาพให้ความรู้สึกสงบ", "summary"),
        ("**Image description:** a red bus.", "boilerplate"),
    ],
)
def test_file_names_markup_and_summaries(text: str, flag: str) -> None:
    assert flag in flags(text)


@pytest.mark.parametrize(
    "text",
    [
        "A sign that says 'sorry' hangs on the door of a closed shop.",
        "A hand-written note reads \"I'm sorry, but I can't stay\", with a heart below it.",
        "A note that reads ‘I’m sorry, I can’t go on’ lies on the dogs' blanket.",
        "A poster with the words Sorry, we are closed hangs in a window.",
        "A man using a computer: the user interface of a photo editor fills the screen.",
        "A smartphone shows the user's profile with three photographs below a name.",
        'A laptop shows a folder in which a file "photo.jpg" is selected.',
        'A billboard says "Your image here" above a telephone number.',
        "A blue billboard with white letters: Your photo here.",
        "A woman says goodbye to her dog; the scene is warmly lit.",
        "An AI-generated picture of a robot as an aide of a nurse.",
        "Here is where the river bends: a wooden bridge and two fishermen.",
        "A man sure of himself strides across a stage, certainly no beginner.",
        "A long-haired dachshund lies on a 1960s sofa - its head on a cushion - and sleeps.",
        "An overall made of blue denim hangs from a line. The overall pattern of the tiles is a star.",
        "SALE SALE SALE, says a shop window in red letters 50% high.",
        "2. Bundesliga match: two players jump for the ball.",
        "A chessboard: a black king on e8, a white queen on d7 and pawns on a2, b2 and c2.",
        "一位老人坐在公园的长椅上看报纸，旁边的牌子上写着“抱歉，我们打烊了”。",
        "图书馆里坐满了看书的学生，一名用户界面设计师在笔记本电脑上画草图。",
        "抱着猫的女孩站在窗前，窗外下着雨。",
        "店の入口に「申し訳ございませんが、本日休業」と書かれた紙が貼られています。",
        "利用者が並ぶ図書館のカウンターで、女性が本を受け取っています。",
        "문에 '죄송합니다. 저는 지금 없습니다'라고 적힌 종이가 붙어 있고 그 옆에 자전거가 있습니다.",
        "Un hombre sostiene su foto de boda frente a la ventana, con gesto claro.",
        "Une femme désolée regarde la pluie ; une image est accrochée au mur.",
        "Une rue désolée, mais éclairée par un réverbère, s'étend vers l'horizon.",
        "Drei Kinder lachen, wenn sie noch auf dem Rasen sind; die Bälle sind bunt.",
        "Ein Mann im orangefarbenen Overall, der einen Schlauch hält. Er gießt insgesamt drei Beete.",
        "Ein Schild sagt „Ich kann keine Noten“; daneben steht ein Klavier.",
        "Ein Mann zeigt auf ihr Bild; natürlich fällt das Licht durch ein Fenster.",
        "Uma mulher mostra a imagem de um santo; claro, o céu ilumina a praça.",
        "На столе лежит письмо, рядом стоит чашка чая, а на стене висит фотография.",
        "رجل يجلس على مقعد في حديقة ويقرأ جريدة، وبجانبه كلب صغير.",
        "एक आदमी बगीचे में बेंच पर बैठकर अख़बार पढ़ रहा है और पास में एक कुत्ता है।",
        "ผู้หญิงสวมหมวกนั่งอ่านหนังสือใต้ต้นไม้ มีสุนัขนอนอยู่ข้างๆ",
    ],
)
def test_true_captions_have_no_flag(text: str) -> None:
    assert flags(text) == set()


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("The image showcases a red bus.", "A red bus."),
        ("The image is a photograph of a bus.", "A photograph of a bus."),
        ("In this picture, there is a bus.", "A bus."),
        ("**Image description:** a red bus.", "A red bus."),
        ("这张图片展示了一辆红色公交车。", "一辆红色公交车。"),
        ("この画像には、赤いバスが写っています。", "赤いバスが写っています。"),
        ("画像には、赤いバスが写っています。", "赤いバスが写っています。"),
        ("写真は壁に飾られています。", None),
        ("이 사진은 빨간 버스입니다.", "빨간 버스입니다."),
        ("ในภาพนี้มีรถบัสสีแดง", "รถบัสสีแดง"),
        ("La imagen muestra un autobús.", "Un autobús."),
        ("L’image montre un bus.", "Un bus."),
        ("Sur cette image, on voit un bus.", "Un bus."),
        ("Das Bild zeigt einen Bus.", "Einen Bus."),
        ("A imagem mostra um ônibus.", "Um ônibus."),
        ("На изображении показан автобус.", "Автобус."),
        ("На фото — автобус.", "Автобус."),
        ("На фото изображён автобус.", "Автобус."),
        ("사진에는 빨간 버스가 있습니다.", "빨간 버스가 있습니다."),
        ("هذه الصورة تظهر حافلة.", "حافلة."),
        ("तस्वीर में एक लाल बस है।", "एक लाल बस है।"),
        ("تظهر الصورة حافلة.", "حافلة."),
        ("The image of a bus hangs on a wall.", None),
        ("A red bus, and the image shows it well.", None),
        ("The image shows", None),
    ],
)
def test_openings_are_flagged_and_cut_where_a_sentence_remains(text: str, rest: str | None) -> None:
    assert strip_boilerplate(text, QUALITY) == (rest or text)
    assert ("boilerplate" in flags(text)) == (rest is not None)


def test_scripts_that_nobody_asked_for() -> None:
    english = "Describe this image"
    assert flags("A red bus 停在街角，旁边有一棵树 and a house.", prompt=english) == {"other_script"}
    assert flags("一辆红色公交车。", prompt=english) == {"other_script"} and flags("一辆红色公交车。") == set()
    # What is read in the picture, and a name, are none.
    assert flags('A sign says "出口正在维修请绕行" above a door.', prompt=english) == set()
    assert flags("A bowl of 拉面 on a wooden table beside a window.", prompt=english) == set()
    # A café is Latin, kana and Han are one, and nobody was asked for captions that are there.
    assert other_script("un café à l'ombre", english) == 0.0 and other_script("赤いバス", "描述图片") == 0.0
    assert flags("一辆红色公交车。", prompt=None) == set()
    assert "other_script" not in flags("一辆红色公交车。", QualityConfig(max_other_script=1.0), prompt=english)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("描述这张图片", "一名男子穿着印有ADIDAS标志的黑色T恤，站在一辆红色BMW轿车旁边。"),
        ("この画像を説明してください", "男性がNIKEのロゴ入りのTシャツを着て、iPhoneを手に駅のホームに立っている。"),
        ("이 이미지를 설명하세요", "검은색 SUV 한 대가 LG 로고가 있는 건물 앞에 주차되어 있다."),
        ("Опиши изображение", "Женщина в футболке Nike стоит у машины BMW."),
    ],
)
def test_names_and_brands_in_latin_letters_are_no_other_script(prompt: str, text: str) -> None:
    assert flags(text, prompt=prompt) == set()
    assert flags("A red bus stands at a corner.", prompt=prompt) == {"other_script"}
    assert flags(
        f"{text} A tall man stands beside a red car and a tree in the afternoon, and he smiles.", prompt=prompt
    )


def test_a_recipe_adds_phrases_and_replaces_lists(tmp_path) -> None:
    text = "I cannot identify this. Nope, says the model."
    table = {"quality": {"phrases": {"refusal": {"en": [], "mine": [r"nope\b"]}}}}
    quality = Recipe(tmp_path / "r.toml", {"captioning": table}).table("captioning", CaptioningConfig).quality
    assert flags(text, quality) == {"refusal"}
    assert flags("I cannot identify this.", quality) == set() and "refusal" in flags("抱歉，我无法识别。", quality)
    for flag, lists in PHRASES.items():
        nothing = QualityConfig(phrases={flag: dict.fromkeys(lists, ())})
        assert flag not in flags("The image shows **a**. Overall, I am unable to a.jpg. Let me know if", nothing)


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ({"refusals": {}}, "'refusals' is no flag of phrases .did you mean refusal"),
        ({"refusal": {"en": ["("]}}, "refusal.en: '.' is no regular expression"),
        ({"refusal": {"en": ["a*"]}}, "is found in every caption"),
        ({"refusal": {"en": ["(a)b"]}}, "keeps groups"),
        ({"refusal": {"en": [r"Nope\W"]}}, "has capitals"),
    ],
)
def test_mistakes_in_phrases_are_named(tmp_path, phrases: dict, message: str) -> None:
    table = {"quality": {"phrases": phrases}}
    with pytest.raises(UserError, match=f"captioning.quality.phrases.*{message}"):
        Recipe(tmp_path / "r.toml", {"captioning": table}).table("captioning", CaptioningConfig)


def test_the_lists_that_are_built_in_pass_the_same_check() -> None:
    assert PHRASES.keys() <= set(FLAGS)
    QualityConfig(phrases={flag: dict(lists) for flag, lists in PHRASES.items()})
