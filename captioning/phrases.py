"""What current models write that is no caption, by flag and language, as regular expressions in small letters.

A recipe adds to these lists and replaces them, see `captioning.quality.phrases`. Captions are compared in small
letters, with one space for any white space and straight apostrophes, outside of quotation marks and from where a word
begins. Each phrase is as long as it takes that true captions do not have it.
"""

from collections.abc import Mapping

# "I'm sorry, but I can't identify …": captions speak of no "I".
REFUSAL = {
    "en": (
        r"i(?:'m| am) (?:sorry|afraid),? (?:but\b|i (?:can|am|do|could)|that i\b)",
        r"(?:sorry|apologies|i apologi[sz]e),? (?:but )?i (?:can|could|am|do)",
        r"i apologi[sz]e(?:,? but| for (?:the|any))\b",
        r"i (?:can(?:'t|not| not)|could(?:n't| not)|won't|will not|do not|don't) (?:\w+ly )?(?:identify|help with|"
        r"assist|provide|see (?:the|this|any|an|your) (?:image|picture|photo)|view|describe|determine|fulfill|comply|"
        r"access|process|analy[sz]e|recogni[sz]e|have (?:the ability|access|enough))",
        r"i(?:'m| am) (?:unable|not able) to\b",
        r"i won't be able to\b",
        r"as an ai(?:,| (?:language|assistant|model|visual))",
        r"as a (?:large )?language model",
        r"(?:unable|not possible) to (?:process|view|load|open|access) (?:the|this|your) (?:image|picture|photo)",
        r"image (?:itself )?is not visible to me\b",
        r"no image (?:(?:was|has been|is) )?(?:provided|uploaded|attached)",
        r"please (?:provide|upload|share|attach) (?:the|an?|your|another) (?:image|picture|photo)",
    ),
    "zh": (
        r"(?:抱歉|对不起|對不起)[,，。 ]?(?:但|作为|作為|由于|由於|无法|無法|我(?![们們]))",
        r"我(?:无法|無法|不能|没有办法|没法)(?:识别|識別|提供|查看|看到|辨认|確定|确定|回答|描述|协助|帮助|访问|处理|直接)",
        r"作[为為](?:一个|一個|一名)?(?:人工智能|人工智慧|ai|语言模型|語言模型)",
        r"(?:无法|無法|不能)(?:显示|加载|查看|处理|识别)(?:该|此|这张|您的|你的)(?:图片|图像|照片)",
    ),
    "ja": (
        r"申し訳(?:ありません|ございません|ない(?:です)?)が",
        r"(?:画像|写真|人物)[^。]{0,12}(?:識別|特定|認識|閲覧|表示)(?:する(?:こと)?(?:は|が))?でき(?:ません|ない)",
        r"お(?:手伝い|答え)(?:する(?:こと)?(?:は|が))?でき(?:ません|ない)",
        r"(?:すみません|ごめんなさい)(?:が|、)[^。]{0,30}でき(?:ません|ない)",
        r"(?:ai|言語モデル|人工知能)(?:アシスタント)?(?:として|ですので|なので)",
    ),
    "ko": (
        r"죄송(?:합니다만|하지만|합니다[.,]? (?:저는|이 이미지|해당|하지만|그러나))",
        r"(?:저는|죄송합니다[.,]?) [^.]{0,40}(?:수 없습니다|수 없어요)",
        r"(?:인공지능|ai|언어 모델)(?:으로서|로서|이기 때문에|이므로)",
    ),
    "es": (
        r"lo siento,? (?:pero|no)\b",
        r"no puedo (?:identificar|ayudar|proporcionar|ver|describir|procesar|determinar|reconocer|acceder|cumplir)",
        r"como (?:un |una )?(?:modelo de lenguaje|asistente de ia|ia\b|inteligencia artificial)",
    ),
    "fr": (
        r"je suis d[ée]sol[ée]e?,? mais\b",
        r"d[ée]sol[ée]e?,? (?:mais )?je\b",
        r"je ne (?:peux|puis) (?:malheureusement )?pas\b",
        r"je ne suis pas (?:en mesure|capable)",
        r"en tant qu(?:'ia\b|'intelligence artificielle|e modèle de langage|'assistant)",
    ),
    "de": (
        r"(?:es )?tut mir (?:sehr )?leid,? (?:aber|ich|dass)",
        r"ich kann (?:[^.!?]{0,60} )?(?:nicht|keine?[nr]?)\b",
        r"leider kann ich\b",
        r"als (?:ki\b|künstliche intelligenz|sprachmodell)",
    ),
    "pt": (
        r"(?:lamento|desculpe|sinto muito),? (?:mas|não)\b",
        r"não (?:posso|consigo) (?:identificar|ajudar|fornecer|ver|descrever|processar|determinar|reconhecer|acessar)",
        r"como (?:um |uma )?(?:modelo de linguagem|ia\b|assistente de ia|inteligência artificial)",
    ),
    "it": (
        r"mi dispiace,? (?:ma|non)\b",
        r"non posso (?:identificare|aiutar|fornire|vedere|descrivere|elaborare|determinare|riconoscere)",
        r"come (?:un )?(?:modello linguistico|intelligenza artificiale|ia\b)",
    ),
    "nl": (r"(?:het spijt me|sorry),? (?:maar )?ik\b", r"ik kan (?:[^.!?]{0,60} )?(?:niet|geen)\b"),
    "pl": (r"przepraszam,? (?:ale|nie)\b", r"nie (?:mogę|jestem w stanie)\b", r"jako (?:model językowy|ai\b)"),
    "tr": (r"üzgünüm,? (?:ancak|ama|fakat|bu)\b", r"bir yapay zek[aâ]"),
    "ru": (
        r"(?:извините|простите|к сожалению),? (?:но )?я\b",
        r"я не (?:могу|в состоянии|способ)",
        r"как (?:языковая модель|искусственный интеллект|ии\b)",
    ),
    "vi": (r"xin lỗi,? (?:nhưng )?(?:tôi|mình)\b", r"tôi không thể\b"),
    "id": (r"maaf,? (?:saya|tetapi|tapi)\b", r"saya tidak (?:dapat|bisa)\b"),
    "th": (r"ขออภัย(?:ค่ะ|ครับ)?[ ,]*(?:แต่|ฉัน|ผม|ดิฉัน|ไม่สามารถ)", r"(?:ฉัน|ผม|ดิฉัน)ไม่สามารถ"),
    "ar": (
        r"(?:آسف|عذرا|عذرًا|أعتذر)[،,]? (?:لكن|ولكن|لا|فأنا|ولا)",
        r"لا (?:أستطيع|يمكنني)",
        r"(?:كنموذج لغوي|كذكاء اصطناعي|بصفتي)",
    ),
    "hi": (
        r"(?:माफ़|माफ|क्षमा) (?:करें|कीजिए)[,।]? (?:लेकिन|मैं|परंतु)",
        r"मुझे खेद है",
        r"मैं [^।.]{0,60}(?:नहीं कर सकता|नहीं कर सकती|असमर्थ|नहीं पहचान)",
    ),
}

# An answer to somebody, rather than a text about an image.
SPEAKS_OF_USER = {
    "en": (
        r"(?:the|this) user(?:'s (?:request|question|prompt|query|image|photo|picture|message)"
        r"| (?:has (?:not )?(?:uploaded|provided|shared|sent|asked|given|requested)|uploaded|provided|shared|sent|"
        r"asked|asks|wants|gave|says|requested|is asking|is looking for|did not|didn't))",
        r"your (?:image|photo|picture|photograph|request|question|query|prompt|message|upload)\b(?! here)",
        r"you(?:'ve| have)? (?:uploaded|provided|shared|sent|attached|submitted|requested)\b",
        r"you (?:haven't|have not|didn't|did not) (?:uploaded?|provided?|shared?|sen[dt]|attach(?:ed)?)\b",
        r"anything else (?:that )?you(?:'d| would| want| need)\b",
        r"let me know (?:if|what|how|whether|in)\b",
        r"would you like (?:me to|more (?:details|information)|help with|any)\b",
        r"feel free to (?:ask|share|let|provide|reach)\b",
        r"(?:i )?hope (?:this|that) (?:helps|description|caption|meets|was|is)\b",
        r"if you (?:have|need|want|'d like|would like) (?:any|more|further|me|additional|help)\b",
        r"please (?:let me|specify|clarify)\b",
        r"how (?:can|may) i (?:help|assist)\b",
        r"i(?:'m|'d| am| would)(?: be)? (?:happy|glad) to\b",
        r"based on (?:your|the provided)\b",
        r"^(?:sure|certainly|of course|absolutely|okay|ok)(?: thing)?[,!.:]",
        # Models that think aloud.
        r"^(?:got it|hmm)[,.]",
        r"let's (?:break (?:this|it) down|tackle|structure|verify|analy[sz]e)\b",
        r"^here are my reasoning steps\b",
        r"^here(?:'s| is) (?:an?|the|my|your) (?:[\w-]+ ){0,4}(?:description|caption|summary|breakdown|analysis)\b",
        r"(?:provided|uploaded|attached) (?:image|photo|picture)\b",
    ),
    "zh": (
        r"(?:用户|用戶|使用者)(?:上传|上傳|提供|要求|想要|希望|询问|詢問|发送|的问题|的请求)",
        r"[您你](?:上传|上傳|提供|发送|分享|提到)的",
        r"[您你]的(?:图片|图像|圖片|圖像|问题|問題|请求|請求)",
        r"希望(?:这|這|以上|此|能|可以)[^。！]{0,12}(?:帮助|幫助|有用|满足|符合)",
        r"如果[您你](?:有|需要|想|还|還)",
        r"[请請](?:告诉我|告訴我|随时告诉|告知我)",
        r"^(?:好的|当然|當然|没问题)[,，!！。:：]",
        r"^(?:以下|下面)是[^。]{0,16}(?:描述|说明|說明|介绍)",
    ),
    "ja": (
        r"ユーザー(?:が|様が)(?:アップロード|提供|送信|求め|質問)",
        r"(?:ご提供|アップロード|お送り)(?:いただいた|された|くださった)(?:画像|写真)",
        r"お役に立て",
        r"[他ほか]に[^。]{0,12}(?:ご質問|知りたい|お手伝い)",
        r"お気軽に(?:お(?:聞き|尋ね|申し付け|知らせ)|ご質問)",
        r"^(?:もちろん(?:です)?|はい|承知(?:しました|いたしました)|かしこまりました)[、。!！]",
        r"^以下(?:は|に|が)[^。]{0,16}(?:説明|キャプション|描写)",
    ),
    "ko": (
        r"사용자(?:가|께서) (?:업로드|제공|요청|보낸|질문)",
        r"(?:업로드|제공)(?:하신|해 ?주신) (?:이미지|사진)",
        r"(?:추가|더) (?:질문|궁금|도움)[^.]{0,12}(?:있으시|필요하|말씀)",
        r"도움이 되(?:었|길|셨)",
        r"^(?:물론(?:입니다|이죠)?|네|알겠습니다)[,!.]",
    ),
    "es": (
        r"el usuario (?:ha|subió|proporcionó|solicitó|preguntó|quiere|desea)\b",
        r"tu (?:imagen|foto|pregunta|solicitud)\b",
        r"que has (?:subido|proporcionado|compartido|enviado)\b",
        r"si (?:necesitas?|tienes|quieres|deseas?) (?:más|alguna|algo|saber|ayuda|otra)\b",
        r"(?:espero que esta descripción|avísame|házmelo saber|no dudes en)\b",
        r"^¡?(?:claro|por supuesto|desde luego)[,!.:]",
        r"^aquí (?:tienes|está la descripción)\b",
    ),
    "fr": (
        r"l'utilisateur (?:a|souhaite|demande|veut|voudrait)\b",
        r"votre (?:image|photo|question|demande|requête)\b",
        r"vous avez (?:fourni|partagé|téléchargé|envoyé|demandé)",
        r"(?:n'hésitez pas à|faites-moi savoir|j'espère que (?:cela|cette))\b",
        r"si vous (?:avez (?:besoin|d'autres)|souhaitez|voulez)\b",
        r"^(?:bien sûr|certainement|d'accord) ?[,!.:]",
        r"^voici (?:une|la|ma) (?:[\w-]+ ){0,2}(?:description|légende|analyse)\b",
    ),
    "de": (
        r"der (?:nutzer|benutzer|user) (?:hat|möchte|will|fragt|bittet)\b",
        r"deine?[mnrs]? (?:bild|foto|anfrage|frage)\b",
        r"(?:sie|du) (?:hochgeladen|bereitgestellt)\b",
        r"lass(?:en sie)? (?:es )?mich wissen\b",
        r"wenn (?:sie|du) (?:(?:noch|weitere|mehr) )?(?:fragen|details|einzelheiten|informationen|hilfe|wissen)\b",
        r"^(?:natürlich|gerne?|selbstverständlich)[,!.:]",
        r"^hier ist (?:eine|die) (?:[\w-]+ ){0,2}(?:beschreibung|bildbeschreibung|bildunterschrift|analyse)\b",
    ),
    "pt": (
        r"o usuário (?:enviou|forneceu|pediu|quer|deseja|solicitou|perguntou|carregou)\b",
        r"você (?:enviou|forneceu|compartilhou|carregou|pediu)\b",
        r"(?:espero que (?:isso|esta)|me avise|fique à vontade para|não hesite em)\b",
        r"se (?:você )?(?:precisar|quiser|tiver) (?:de )?(?:mais|alguma|ajuda|saber)\b",
        r"^(?:claro|com certeza|certamente)[,!.:]",
        r"^aqui está (?:a|uma) (?:[\w-]+ ){0,2}(?:descrição|legenda)\b",
    ),
    "it": (
        r"l'utente (?:ha|vuole|chiede|desidera)\b",
        r"(?:fammi sapere|spero che questa descrizione|non esitare a)\b",
        r"^(?:certo|certamente|ecco (?:una|la) (?:[\w-]+ ){0,2}descrizione)\b",
    ),
    "ru": (
        r"пользователь (?:загрузил|предоставил|просит|хочет|спрашивает|отправил)",
        r"ваш(?:е|у|его|ем|ем)? (?:изображени|фотографи|вопрос|запрос)",
        r"вы (?:загрузили|предоставили|отправили|прислали)",
        r"(?:дайте мне знать|надеюсь, (?:это|описание))",
        r"если (?:у вас|вам|вы) (?:есть|нужн|хотите|понадоб|остал)",
        r"^(?:конечно|разумеется|безусловно)[,!.:]",
        r"^вот (?:подробное |краткое )?описание",
    ),
    "ar": (
        r"المستخدم (?:قام|طلب|يريد|أرسل)",
        r"(?:صورتك|طلبك|سؤالك)\b",
        r"إذا كنت (?:بحاجة|ترغب|تريد|تحتاج)",
        r"^(?:بالتأكيد|بالطبع)[،,!.:]",
    ),
    "hi": (
        r"(?:उपयोगकर्ता|यूज़र) (?:ने|चाहता|द्वारा)",
        r"आप(?:की|के|ने) (?:छवि|तस्वीर|प्रश्न|अनुरोध|द्वारा)",
        r"(?:यदि|अगर) आप(?:को)? (?:और|कोई|किसी|चाहें)",
        r"^(?:ज़रूर|जरूर|बिल्कुल)[,!।]",
    ),
    "th": (
        r"ผู้ใช้(?:อัปโหลด|อัพโหลด|ส่งมา|ต้องการ|ถาม)",
        r"(?:ภาพ|รูป)(?:ถ่าย)?(?:ของคุณ|ที่คุณ(?:ให้|ส่ง|อัปโหลด|อัพโหลด))",
        r"หากคุณ(?:ต้องการ|มีคำถาม)",
        r"^(?:แน่นอน|ได้เลย)(?:ค่ะ|ครับ)?[,!]",
    ),
}

# Names of files, which say nothing of what is seen. One in quotation marks is what somebody has read in the picture.
FILE_NAME = {
    "any": (
        r"[\w()-]+\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|avif)\b",
        r"(?:img|dscn?|dscf|pxl|imgp|dji|gopr|mvimg)[_-]?\d{4,}",
    ),
    "en": (
        r"(?:the|its|this|your|image) file ?name\b",
        r"file (?:is )?(?:named|titled)\b",
        r"(?:image|picture|photo)(?: file)? (?:is )?named\b",
        r"(?:jpe?g|png|webp) (?:image|file|format)\b",
    ),
    "zh": (r"(?:文件|檔案|档)名",),
    "ja": (r"ファイル名",),
    "ko": (r"파일 ?(?:이름|명)",),
    "es": (r"nombre (?:del|de) archivo\b",),
    "fr": (r"nom (?:du|de) fichier\b",),
    "de": (r"dateiname",),
    "pt": (r"nome do (?:arquivo|ficheiro)\b",),
    "ru": (r"(?:имя|имени|названи[ею]) файла",),
}

# Openings that can be cut so that what remains is a sentence: only there, at the start of the caption.
BOILERPLATE = {
    "en": (
        r"(?:the|this)\s+(?:image|picture|photo|photograph|scene)\s+(?:features|depicts|shows|displays|showcases|captures|"
        r"presents|portrays|contains|illustrates|is\s+of|is(?=\s+an?\s))\s+",
        r"in\s+(?:the|this)\s+(?:image|picture|photo|photograph),?\s+(?:there\s+(?:is|are)|(?:we|you|one)\s+(?:can\s+)?see)\s+",
        r"[*#_ ]*(?:(?:detailed|image|short|brief)\s+)*(?:description|caption)(?:\s+of\s+the\s+image)?[*_ ]*:[*_\s]*",
    ),
    "zh": (
        r"[这此该這該][张幅張个個]?(?:图片|图像|照片|画面|图|圖片|圖像|畫面|圖|场景)(?:主要|中|里)?"
        r"(?:展示了|展示|显示了|显示|顯示了|描绘了|描繪了|呈现了|呈现|呈現了|展现了|展現了|捕捉了|拍摄了|是)[,，:：]?",
        r"(?:图片|图像|画面|图|照片|圖片|畫面|圖)[中里裡](?:有|是|展示了|显示了|可以看到|我们可以看到|,|，)",
    ),
    "ja": (r"この(?:画像|写真)(?:には|では|は)、?", r"(?:画像|写真)(?:には|では)、?"),
    "ko": (r"이 (?:이미지|사진)(?:에서는|에는|은|는)\s+", r"(?:이미지|사진)(?:에서는|에는)\s+"),
    "es": (
        r"(?:en )?(?:la|esta) (?:imagen|foto|fotografía|escena),? (?:muestra|presenta|captura|representa|contiene|"
        r"se (?:ve|muestra|observa|puede ver|aprecia)|hay|podemos ver)\s+",
    ),
    "fr": (
        r"(?:dans |sur )?(?:l['’]|cette |la )(?:image|photo|photographie|scène),? (?:montre|présente|représente|"
        r"illustre|capture|dépeint|on (?:voit|peut voir)|il y a)\s+",
    ),
    "de": (
        r"(?:auf )?(?:das|dieses|dem|diesem|die|diese|der|dieser) (?:bild|foto|fotografie|szene|aufnahme) "
        r"(?:zeigt|präsentiert|enthält|sieht man|sehen wir)\s+",
    ),
    "pt": (
        r"(?:a|esta|na|nesta) (?:imagem|foto|fotografia|cena),? (?:mostra|apresenta|retrata|captura|exibe|contém|vemos|"
        r"podemos ver|há|vê-se)\s+",
    ),
    "it": (r"(?:l['’]|quest['’]|la |questa )(?:immagine|foto|fotografia|scena) (?:mostra|presenta|raffigura|ritrae) ",),
    "ru": (
        r"на (?:этом |данном |этой |данной )?(?:изображении|фото|фотографии|картинке|снимке) (?:изображ[её]н[аоы]?|"
        r"показан[аоы]?|мы видим|видно|можно увидеть|представлен[аоы]?|[—–-])\s+",
    ),
    "ar": (
        r"(?:تظهر|تُظهر|تعرض|تصور) (?:هذه )?الصورة\s+",
        r"(?:هذه )?الصورة (?:تظهر|تُظهر|تعرض|تصور)\s+",
        r"في (?:هذه )?الصورة[،,]? (?:يظهر|تظهر|نرى|يوجد)\s+",
    ),
    "hi": (r"(?:इस|यह) (?:छवि|तस्वीर|चित्र) (?:में|दिखाती है|दर्शाती है)\s+", r"(?:छवि|तस्वीर|चित्र) में\s+"),
    "th": (r"(?:ใน)?(?:รูป)?ภาพ(?:ถ่าย)?นี้(?:มี|แสดงให้เห็น(?:ถึง)?|แสดง|เป็น) ?",),
}

# Sentences that say again what was said, or what one is to feel: InternVL and Qwen end with them. Each begins one.
SUMMARY = {
    "en": (
        r"(?:overall|in summary|in conclusion|to summarize|in essence|all in all),",
        r"the (?:overall )?(?:image|scene|composition|photograph|setting) (?:conveys|evokes|exudes|creates) (?:an?|the)"
        r"(?: \w+)? (?:sense|feeling|mood|atmosphere|impression)\b",
        r"the overall (?:atmosphere|mood|ambian?ce|feel|impression|effect)\b",
    ),
    "zh": (
        r"(?:总的来说|总体而言|总体来说|整体而言|整体来看|综上所述|總的來說|總體而言|整體而言|总之)[,，]",
        r"整[个個体體幅](?:画面|场景|图像|图片|畫面|場景)(?:给人|給人|营造|傳達|传达|散发)",
        r"整[个個体體](?:氛围|氛圍|气氛|氣氛)",
    ),
    "ja": (r"(?:全体的に|全体として|まとめると|総じて)、?",),
    "ko": (r"(?:전반적으로|전체적으로|요약하자면)[, ]",),
    "es": (r"en (?:general|resumen|conclusión|conjunto),",),
    "fr": (r"(?:dans l'ensemble|en résumé|en somme|globalement),",),
    "de": (r"(?:insgesamt|zusammenfassend|alles in allem)\b",),
    "pt": (r"(?:no geral|em resumo|de modo geral|em suma),",),
    "it": (r"(?:nel complesso|in generale|in sintesi),",),
    "ru": (r"(?:в целом|подводя итог|таким образом),",),
    "ar": (r"(?:بشكل عام|باختصار|في المجمل)[،,]",),
    "hi": (r"(?:कुल मिलाकर|संक्षेप में),?",),
    "th": (r"โดยรวม(?:แล้ว)?",),
}

# Of Markdown, chat templates and reasoning: a caption is plain text. `^` is the start of a line.
MARKUP = {
    "any": (
        r"\*\*[^*\n]+\*\*",
        r"^[ \t]*#{1,6}[ \t]+\S",
        r"^[ \t]*[-*•+][ \t]+\S",
        r"^[ \t]*(?:key ?words|tags)[ \t]*:",
        r"^[ \t]*\d{1,2}[.)][ \t]+\S.*\n(?:.*\n){0,3}?[ \t]*\d{1,2}[.)][ \t]+\S",
        r"```",
        r"</?(?:think|thinking|answer|box|ref|quad|image|img|p|br|b|i|div|span|s|ul|li|h[1-6]|eos|bos|pad|unk|"
        r"(?:start|end)_of_\w+)\b[^<>\n]*>",
        r"<\|[^|\n]{1,40}\|",
        r"\[/?inst\]",
        r"^(?:assistant|user|human|system)[ \t]*:",
        r"\\n",
        r"^[ \t\n]*[{[][ \t\n]*\"",
    ),
}

PHRASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "boilerplate": BOILERPLATE,
    "summary": SUMMARY,
    "markup": MARKUP,
    "refusal": REFUSAL,
    "speaks_of_user": SPEAKS_OF_USER,
    "file_name": FILE_NAME,
}
