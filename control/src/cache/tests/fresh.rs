//! What is kept decoded, and encoded, and for how long.

use super::*;

#[tokio::test]
async fn an_event_that_is_no_longer_fresh_tells_the_same() {
    let config = CacheConfig {
        fresh: Duration::ZERO,
        ..CacheConfig::default()
    };
    let world = world_with(EmbeddedConfig::default(), config).await;
    let (_, mut events) = world.cache.reader::<Pod>().events();
    world.put("a", "1").await;
    world.put("a", "2").await;
    world.commit([delete("a")]).await;
    let last = world.put("b", "1").await;
    world.cache.wait_for(last).await;
    let told = take(&mut events, 4).await;
    assert_eq!(told, ["+a=1@1", "~a=2<1@2", "-a@3", "+b=1@4"]);
}

#[tokio::test]
async fn an_event_is_encoded_once() {
    let world = world().await;
    let reader = world.cache.reader::<Pod>();
    let ((_, mut one), (_, mut other)) = (reader.events(), reader.events());
    world.put("a", "n").await;
    let (one, other) = (one.next().await.unwrap(), other.next().await.unwrap());
    assert!(Arc::ptr_eq(&one, &other));
    assert_eq!(one.encoded_object().as_ptr(), other.encoded_object().as_ptr());
    let object = orlop_proto::api::v1::Object::decode(one.encoded_object().clone()).unwrap();
    assert_eq!(Pod::from_object(object).as_ref(), Some(&**one.event().object()));
}
